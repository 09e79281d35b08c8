// Unit test of the expert cache: real files and real reads, no model.

#include "../src/llama-expert-bias.h"
#include "../src/llama-expert-forecast.h"
#include "../src/llama-expert-probe.h"
#include "../src/llama-expert-warm.h"

#include "test-expert-file.h"

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <sys/stat.h>

// event-atomic LRU as a list, most recent last: hits are refreshed first, then misses come in
struct reference_lru {
    size_t           n_slots;
    std::vector<int> order;
    uint64_t         hits = 0, misses = 0;

    void event(const std::vector<int32_t> & ids) {
        std::vector<int> hit, miss;
        for (const int e : ids) {
            (std::find(order.begin(), order.end(), e) != order.end() ? hit : miss).push_back(e);
        }
        for (const int e : hit) {
            order.erase(std::find(order.begin(), order.end(), e));
            order.push_back(e);
        }
        for (const int e : miss) {
            if (order.size() == n_slots) {
                order.erase(order.begin());
            }
            order.push_back(e);
        }
        hits += hit.size();
        misses += miss.size();
    }
};

static void test_decode(const test_file & file, llama_expert_io_mode io) {
    for (const auto policy : { LLAMA_EXPERT_POLICY_LRU, LLAMA_EXPERT_POLICY_LFU, LLAMA_EXPERT_POLICY_NEXT_USE }) {
        for (const int n_slots : { K, 6, 9, N_EXPERT }) {
            for (const int n_threads : { 1, 3 }) {
                llama_expert_files files({ file.fd }, io);
                llama_expert_cache cache(files, file.groups, policy, 3);
                cache.allocate(n_slots);

                router                     route(n_slots * 10 + n_threads);
                std::vector<reference_lru> ref(N_LAYERS, { (size_t) n_slots, {}, 0, 0 });
                std::vector<std::set<int>> last(N_LAYERS);

                for (int t = 0; t < 40; t++) {
                    for (int il = 0; il < N_LAYERS; il++) {
                        const auto ids    = route.token(il);
                        const auto before = cache.counters(il);
                        run_call(cache, file, il, ids, K, n_threads);
                        const auto after = cache.counters(il);

                        ref[il].event(ids);

                        // the lemma: with C >= K everything the last token used is there, and nothing else if C == K
                        const uint64_t hits = after.hits - before.hits;
                        const uint64_t kept = std::count_if(ids.begin(), ids.end(), [&](int e) { return last[il].count(e) > 0; });
                        assert(hits >= kept);
                        assert(n_slots != K || hits == kept);
                        assert(after.hits - before.hits + after.misses - before.misses == K);
                        last[il] = std::set<int>(ids.begin(), ids.end());
                    }
                }
                for (int il = 0; il < N_LAYERS; il++) {
                    const auto c = cache.counters(il);
                    if (policy == LLAMA_EXPERT_POLICY_LRU) {
                        assert(c.hits == ref[il].hits && c.misses == ref[il].misses);
                    }
                    size_t size = 0;
                    for (const auto & t : file.groups[il].tensors) {
                        size += t.size;
                    }
                    assert(c.reads == c.misses * N_TENSORS && c.bytes_demand == c.misses * size);
                    assert(c.calls == 40 && c.calls_streamed == 0);
                    assert(c.evictions == (c.misses > (uint64_t) n_slots ? c.misses - n_slots : 0) || n_slots == N_EXPERT);
                    assert(n_slots == N_EXPERT || c.evictions > 0);
                }
            }
        }
    }
}

// decode with experts read ahead, some of them expected rightly, some not; one tensor is transformed on its way
static void test_ahead(const test_file & file, llama_expert_io_mode io) {
    test_file transformed = file.with_transform(1);
    for (const int n_slots : { K, 6, 9, N_EXPERT }) {
        for (const int n_readers : { 1, 4 }) {
            llama_expert_files files({ file.fd }, io);
            llama_expert_cache cache(files, transformed.groups, LLAMA_EXPERT_POLICY_NEXT_USE, n_readers, [&](int group, int tensor, const uint8_t * src, uint8_t * dst) {
                for (size_t i = 0; i < transformed.groups[group].tensors[tensor].size; i++) {
                    dst[i] = src[i] ^ MASK;
                }
            });
            cache.allocate(n_slots);

            router                     route(n_slots * 10 + n_readers);
            std::mt19937               rng(n_slots);
            std::vector<std::set<int>> last(N_LAYERS);
            uint64_t                   n_asked = 0;

            for (int t = 0; t < 60; t++) {
                for (int il = 0; il < N_LAYERS; il++) {
                    std::vector<int32_t> ids;
                    for (int i = 0; i < (t % 10 == 9 ? 10 : 1); i++) { // now and then a call that streams
                        const auto token = route.token(il);
                        ids.insert(ids.end(), token.begin(), token.end());
                    }
                    // what the layer is about to need, with errors; a moment later the call comes
                    std::vector<int> expected;
                    for (const int e : ids) {
                        expected.push_back(rng() % 3 == 0 ? (int) (rng() % N_EXPERT) : e);
                    }
                    cache.read_ahead(il, expected);
                    std::this_thread::sleep_for(std::chrono::microseconds(rng() % 300));

                    const auto   before   = cache.counters(il);
                    const size_t n_needed = std::set<int>(ids.begin(), ids.end()).size();
                    run_call(cache, transformed, il, ids, K, 1 + t % 3);
                    const auto after = cache.counters(il);

                    const uint64_t hits = after.hits - before.hits;
                    assert(hits + after.misses - before.misses == n_needed);
                    if (ids.size() == K && t % 10 != 0) {
                        assert(hits >= (uint64_t) std::count_if(ids.begin(), ids.end(), [&](int e) { return last[il].count(e) > 0; }));
                    }
                    last[il] = std::set<int>(ids.begin(), ids.end());
                    n_asked += n_needed;
                }
            }
            const auto c = cache.counters(-1);
            assert(c.hits + c.misses == n_asked);
            assert(c.hits_ahead <= c.hits && c.bytes_used <= c.bytes_ahead);
            assert(n_slots == K || n_slots == N_EXPERT || (c.hits_ahead > 0 && c.bytes_used < c.bytes_ahead));
        }
    }
}

// a read ahead that fails is nobody's error; asked for, it is
static void test_ahead_fault(test_file & file, llama_expert_io_mode io) {
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);
    cache.allocate(8);

    const int    il   = N_LAYERS - 1;
    const auto & last = file.groups[il].tensors[N_TENSORS - 1];
    run_call(cache, file, il, { 0, 1, 2, 3 }, K, 2);

    assert(truncate(file.path.c_str(), last.offs + 14 * last.size + 100) == 0);
    cache.read_ahead(il, { 14, 15 });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    run_call(cache, file, il, { 0, 1, 2, 3 }, K, 2);
    assert(cache.last_error()[0] == '\0');

    cache.read_ahead(il, { 14, 15 });
    run_op(cache, file, il, 0, { 0, 1, 2, 14 }, K, 2);
    run_op(cache, file, il, 1, { 0, 1, 2, 14 }, K, 2);
    assert(run_op(cache, file, il, 2, { 0, 1, 2, 14 }, K, 2).back() == -2);
    assert(std::string(cache.last_error()).find("expert 14") != std::string::npos);

    file.write_out();
    run_call(cache, file, il, { 0, 1, 2, 14 }, K, 2);
}

// experts are loaded before the first call, or while calls run: they are hits, no counter has their bytes, and what they
// take from a call is nothing
static void test_load(const test_file & file, llama_expert_io_mode io) {
    size_t n_expert_bytes = 0;
    for (const auto & t : file.groups[0].tensors) {
        n_expert_bytes += t.size;
    }
    for (const int n_slots : { K, 6, 9, N_EXPERT }) {
        for (const int n_readers : { 1, 4 }) {
            for (const bool wait : { true, false }) {
                llama_expert_files files({ file.fd }, io);
                llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_NEXT_USE, n_readers);
                cache.allocate(n_slots);
                assert(cache.holds_all() == (n_slots == N_EXPERT) && !cache.used());

                // more than there is room for: the first ones count
                std::vector<std::vector<int>> experts(N_LAYERS);
                for (int i = 0; i < N_EXPERT; i++) {
                    for (int il = 0; il < N_LAYERS; il++) {
                        experts[il].push_back((7 * i + il) % N_EXPERT);
                    }
                }
                cache.load(experts);

                router route(n_slots + n_readers);
                if (wait) {
                    cache.wait_loaded();
                    for (int il = 0; il < N_LAYERS; il++) {
                        const auto here = cache.resident(il);
                        for (int i = 0; i < N_EXPERT; i++) {
                            assert(here[experts[il][i]] == (i < n_slots));
                        }
                        auto hot = cache.hot()[il];
                        std::sort(hot.begin(), hot.end());
                        auto wanted = std::vector<int>(experts[il].begin(), experts[il].begin() + n_slots);
                        std::sort(wanted.begin(), wanted.end());
                        assert(hot == wanted);
                    }
                    const std::vector<int32_t> ids(experts[0].begin(), experts[0].begin() + K);
                    run_call(cache, file, 0, ids, K, 2);

                    const auto c = cache.counters(-1);
                    assert(c.hits == K && c.misses == 0 && c.reads == 0 && c.bytes_demand == 0 && c.bytes_ahead == 0 && c.read_ns == 0);
                    assert(cache.bytes_loaded() >= n_slots * N_LAYERS * n_expert_bytes); // later layers have larger slices
                    assert(cache.used());
                }
                for (int t = 0; t < 21; t++) {
                    for (int il = 0; il < N_LAYERS; il++) {
                        std::vector<int32_t> ids;
                        for (int i = 0; i < (t % 10 == 3 ? 10 : 1); i++) { // now and then a call that streams
                            const auto token = route.token(il);
                            ids.insert(ids.end(), token.begin(), token.end());
                        }
                        if (t % 4 == 1) {
                            cache.read_ahead(il, { (int) (route.rng() % N_EXPERT), (int) (route.rng() % N_EXPERT) });
                        }
                        run_call(cache, file, il, ids, K, 1 + t % 3);
                        if (t % 7 == 5) {
                            cache.load(experts); // nothing may break where a load meets calls
                        }
                    }
                }
                cache.wait_loaded();
                for (const auto & hot : cache.hot()) {
                    assert(hot.size() <= (size_t) n_slots && std::set<int>(hot.begin(), hot.end()).size() == hot.size());
                }
                if (n_slots == N_EXPERT && wait) {
                    assert(cache.counters(-1).misses == 0 && cache.counters(-1).evictions == 0);
                }
            }
        }
    }
}

// what cannot be loaded is nobody's error until somebody asks for it; a cache that goes does not wait for what is left
static void test_load_fault(test_file & file, llama_expert_io_mode io) {
    const int    il   = N_LAYERS - 1;
    const auto & last = file.groups[il].tensors[N_TENSORS - 1];

    std::vector<std::vector<int>> experts(N_LAYERS, std::vector<int>{ 0, 1, 2, 3, 14, 15 });
    {
        llama_expert_files files({ file.fd }, io);
        llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);
        cache.allocate(8);

        assert(truncate(file.path.c_str(), last.offs + 14 * last.size + 100) == 0);
        cache.load(experts);
        cache.wait_loaded();
        assert(cache.last_error()[0] == '\0');

        run_call(cache, file, il, { 0, 1, 2, 3 }, K, 2);
        run_op(cache, file, il, 0, { 0, 1, 2, 14 }, K, 2);
        run_op(cache, file, il, 1, { 0, 1, 2, 14 }, K, 2);
        assert(run_op(cache, file, il, 2, { 0, 1, 2, 14 }, K, 2).back() == -2);
        assert(std::string(cache.last_error()).find("expert 14") != std::string::npos);

        file.write_out();
        run_call(cache, file, il, { 0, 1, 2, 14 }, K, 2);
    }
    for (int i = 0; i < 20; i++) {
        llama_expert_files files({ file.fd }, io);
        llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);
        cache.allocate(8);
        cache.load(experts);
        for (const auto & hot : cache.hot()) {
            assert(std::set<int>(hot.begin(), hot.end()) == std::set<int>(experts[0].begin(), experts[0].end()));
        }
    }
}

static void put(const std::string & path, const std::string & text) {
    unlink(path.c_str()); // file systems flush what takes the place of other content
    FILE * f = fopen(path.c_str(), "wb");
    assert(f && fwrite(text.data(), 1, text.size(), f) == text.size());
    fclose(f);
}

static std::string get(const std::string & path) {
    std::string res;
    FILE *      f = fopen(path.c_str(), "rb");
    assert(f);
    for (int c = fgetc(f); c != EOF; c = fgetc(f)) {
        res.push_back((char) c);
    }
    fclose(f);
    return res;
}

static void test_hot_set() {
    const std::string          path = "test-expert-cache-" + std::to_string(getpid()) + ".hot";
    const std::vector<int>     n_experts{ 16, 16, 8 };
    const llama_expert_hot_set hot = {
        0x0123456789abcdefull,
        { { 3, 14, 1 }, {}, { 7 } }
    };
    llama_expert_hot_set got;
    bool                 missing = false;

    const auto read = [&] { return llama_expert_hot_set_read(path, hot.model, n_experts, got, missing); };

    assert(!read().empty() && missing);
    assert(llama_expert_hot_set_writable(path).empty());
    assert(!llama_expert_hot_set_writable("no/such/folder/file").empty());
    assert(!llama_expert_hot_set_write("no/such/folder/file", hot).empty());

    assert(llama_expert_hot_set_write(path, hot).empty());
    const std::string text = get(path);
    assert(text == "remoe-edge hot set 1\nmodel 0123456789abcdef\nlayers 3\n3 14 1\n\n7\nend\n");
    assert(read().empty() && !missing && got.model == hot.model && got.experts == hot.experts);

    // cut off anywhere, or with anything changed to something else: refused, or another hot set of this very model
    std::mt19937 rng(1);
    for (size_t n = 0; n < text.size(); n++) {
        put(path, text.substr(0, n));
        assert(!read().empty() && !missing && got.experts.empty());
    }
    for (int i = 0; i < 2000; i++) {
        std::string other = text;
        for (int k = 0; k < 1 + i % 3; k++) {
            const char c = i % 2 ? (char) rng() : "0123456789 \n-"[rng() % 13];
            switch (rng() % 3) {
                case 0: other[rng() % other.size()] = c; break;
                case 1: other.insert(rng() % other.size(), 1, c); break;
                case 2: other.erase(rng() % other.size(), 1); break;
            }
        }
        put(path, other);
        if (read().empty()) {
            assert(got.experts.size() == 3);
            for (int il = 0; il < 3; il++) {
                for (const int e : got.experts[il]) {
                    assert(e >= 0 && e < n_experts[il]);
                }
                assert(std::set<int>(got.experts[il].begin(), got.experts[il].end()).size() == got.experts[il].size());
            }
        }
    }
    for (const auto & [bad, why] : std::map<std::string, std::string>{
             { "remoe-edge hot set 2" + text.substr(20),                                            "its version is not 1"             },
             { "remoe-edge hot set 1\nmodel ffffffffffffffff\nlayers 3\n\n\n\nend\n",               "it was written for another model" },
             { "remoe-edge hot set 1\nmodel 0123456789abcdef\nlayers 3\n16\n\n\nend\n",             "it is damaged"                    },
             { "remoe-edge hot set 1\nmodel 0123456789abcdef\nlayers 3\n1 1\n\n\nend\n",            "it is damaged"                    },
             { "remoe-edge hot set 1\nmodel 0123456789abcdef\nlayers 3\n99999999999999\n\n\nend\n", "it is damaged"                    },
             { "something else",                                                                    "it is not a hot set"              },
    }) {
        put(path, bad);
        assert(read() == why);
    }

    // a damaged one is written anew, anything else stays
    put(path, text.substr(0, 30));
    assert(llama_expert_hot_set_write(path, hot).empty() && get(path) == text);
    put(path, "something else");
    assert(!llama_expert_hot_set_write(path, hot).empty() && get(path) == "something else");
    unlink(path.c_str());
    assert(mkfifo(path.c_str(), 0600) == 0);
    assert(read() == "it is not a regular file" && !llama_expert_hot_set_write(path, hot).empty());
    unlink(path.c_str());
    assert(mkdir(path.c_str(), 0700) == 0);
    assert(!read().empty() && !llama_expert_hot_set_write(path, hot).empty());
    rmdir(path.c_str());
}

static void test_readers_file() {
    typedef std::vector<llama_expert_readers> entries;

    const std::string folder = "test-expert-cache-" + std::to_string(getpid()) + ".dir";
    const std::string path   = folder + "/in/readers.txt";
    const entries     wanted = {
        { 66306, "direct", 2097152, 4,  2870 },
        { 7,     "mmap",   4096,    16, 0    }
    };
    const auto same = [](const entries & a, const entries & b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto & x, const auto & y) {
            return x.device == y.device && x.io == y.io && x.size == y.size && x.n == y.n && x.mb_per_s == y.mb_per_s;
        });
    };
    assert(llama_expert_readers_read(path).empty() && llama_expert_readers_read("").empty());
    assert(!llama_expert_readers_write("", wanted).empty());
    assert(!llama_expert_readers_write("/proc/no/readers.txt", wanted).empty());
    assert(llama_expert_readers_write(path, wanted).empty());

    const std::string text = get(path);
    assert(text == "remoe-edge readers 1\n66306 direct 2097152 4 2870\n7 mmap 4096 16 0\nend\n");
    assert(same(llama_expert_readers_read(path), wanted));

    // cut off anywhere: nothing; with anything changed: nothing, or entries within bounds
    std::mt19937 rng(2);
    for (size_t n = 0; n < text.size(); n++) {
        put(path, text.substr(0, n));
        assert(llama_expert_readers_read(path).empty());
    }
    for (int i = 0; i < 2000; i++) {
        std::string other = text;
        for (int k = 0; k < 1 + i % 3; k++) {
            const char c = i % 2 ? (char) rng() : "0123456789 \n-"[rng() % 13];
            switch (rng() % 3) {
                case 0: other[rng() % other.size()] = c; break;
                case 1: other.insert(rng() % other.size(), 1, c); break;
                case 2: other.erase(rng() % other.size(), 1); break;
            }
        }
        put(path, other);
        for (const auto & e : llama_expert_readers_read(path)) {
            assert((e.io == "direct" || e.io == "mmap") && (e.n == 1 || e.n == 2 || e.n == 4 || e.n == 8 || e.n == 16));
            assert(e.size <= 1ull << 40 && e.mb_per_s >= 0 && e.mb_per_s <= 1000000);
        }
    }
    for (const std::string bad : { "1 direct 1 3 1", "1 direct 1 32 1", "1 tape 1 4 1", "99999999999999999999 mmap 1 4 1", "1 mmap 1 4 1 ", "-1 mmap 1 4 1", "1 mmap 1 4", "1  1 4 1", "" }) {
        put(path, "remoe-edge readers 1\n" + bad + "\nend\n");
        assert(llama_expert_readers_read(path).empty());
    }

    // the file does not grow for ever: the newest stay
    entries many;
    for (int i = 0; i < 100; i++) {
        many.push_back({ (uint64_t) i, "mmap", 4096, 1, i });
    }
    assert(llama_expert_readers_write(path, many).empty());
    const auto kept = llama_expert_readers_read(path);
    assert(kept.size() == 64 && kept.front().device == 36 && kept.back().device == 99);

    unlink(path.c_str());
    rmdir((folder + "/in").c_str());
    rmdir(folder.c_str());

    // the smallest within 5 %
    typedef std::vector<std::pair<int, double>> rates;
    assert(llama_expert_readers_choose({}) == 0);
    assert(llama_expert_readers_choose(rates{
               { 1,  100 },
               { 2,  190 },
               { 4,  290 },
               { 8,  300 },
               { 16, 280 }
    }) == 4);
    assert(llama_expert_readers_choose(rates{
               { 1, 100 },
               { 2, 99  },
               { 4, 104 }
    }) == 1);
    assert(llama_expert_readers_choose(rates{
               { 1, 100 },
               { 2, 200 },
               { 4, 400 }
    }) == 4);
    assert(llama_expert_readers_choose(rates{
               { 1, 0 }
    }) == 0);
}

// storage that serves one read at a time wants few readers, storage that serves many wants many
static void test_readers_probe(const test_file & file, llama_expert_io_mode io) {
    std::mutex one;
    const auto rates = [&](bool serial, size_t n_room) {
        const llama_expert_files files({ file.fd }, io, [&](int fd, void * dst, size_t size, off_t offs) {
            std::unique_lock<std::mutex> lock(one, std::defer_lock);
            if (serial) {
                lock.lock();
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
            return pread(fd, dst, size, offs);
        });
        assert(files.device(0) != 0);
        return llama_expert_readers_measure(files, file.groups, n_room);
    };
    const size_t room = 64 << 20;

    // of a few tries: other load on the machine may spoil one
    int    best = 0;
    double gain = INFINITY; // of 16 threads over one
    for (int i = 0; i < 5 && best < 8; i++) {
        best = std::max(best, llama_expert_readers_choose(rates(false, room)));
    }
    for (int i = 0; i < 5 && gain >= 2; i++) {
        const auto serial = rates(true, room);
        assert(serial.front().first == 1);
        gain = std::min(gain, serial.back().second / serial.front().second);
    }
    assert(best >= 8);
    assert(gain < 2);
    assert(rates(false, 0).size() == 1); // no room for more

    // a read that fails says nothing about storage
    const llama_expert_files broken({ file.fd }, io, [](int, void *, size_t, off_t) -> ssize_t { errno = EIO; return -1; });
    assert(llama_expert_readers_measure(broken, file.groups, room).empty());
}

static void test_forecast() {
    // expert e looks at dimension e; the second norm doubles dimension 2
    const int          n = 32;
    std::vector<float> identity(n * n, 0.0f), ones(n, 1.0f), doubled(n, 1.0f), bias(n, 0.0f), choice(n, 0.0f), x(2 * n, 0.0f);
    for (int i = 0; i < n; i++) {
        identity[i * n + i] = 1.0f;
    }
    doubled[2] = 2.0f;
    x[1]       = 3.0f;
    x[2]       = 2.0f;
    x[n + 5]   = 1.0f;

    llama_expert_router cur  = { n, n, 2, identity.data(), nullptr, nullptr, ones.data(), false };
    llama_expert_router next = { n, n, 2, identity.data(), nullptr, nullptr, doubled.data(), false };
    assert((llama_expert_forecast(cur, next, x.data(), 1, n) == std::vector<int>{ 2, 1 }));

    bias[7]   = 10.0f;
    next.bias = bias.data();
    assert((llama_expert_forecast(cur, next, x.data(), 1, n) == std::vector<int>{ 7, 2 }));

    // first choices of all tokens first
    next.bias      = nullptr;
    const auto two = llama_expert_forecast(cur, next, x.data(), 2, n);
    assert(two.size() == 4 && two[0] == 2 && two[1] == 5 && two[2] == 1);

    choice[9]    = 1.0f;
    next.choice  = choice.data();
    next.sigmoid = true;
    assert(llama_expert_forecast(cur, next, x.data(), 1, n)[0] == 9);
}

// a layer is read ahead as long as most of what is forecast for it is used
static void test_judge() {
    std::mt19937 rng(1);

    const auto feed = [&rng](llama_expert_judge & judge, double precision, int n_calls) {
        int n_wanted = 0, n_pays = 0;
        for (int i = 0; i < n_calls; i++) {
            if (judge.wants()) {
                n_wanted++;
                int n_used = 0;
                for (int k = 0; k < 3; k++) {
                    n_used += rng() % 1000 < precision * 1000;
                }
                n_pays += judge.pays;
                judge.score(3, n_used);
            }
        }
        return std::make_pair(n_wanted, n_pays);
    };

    // every forecast is made until there is a judgement; good ones are read ahead then, all of them
    llama_expert_judge judge;
    assert(feed(judge, 0.9, 100) == std::make_pair(100, 92) && judge.pays);
    assert(judge.precision > 0.8f && judge.precision < 1.0f);

    // it stops when they are bad, and most are not made any more
    feed(judge, 0.2, 100);
    assert(!judge.pays && judge.precision < 0.55f);
    assert(feed(judge, 0.2, 800) == std::make_pair(100, 0));

    // and comes back when they are good again
    feed(judge, 0.95, 800);
    assert(judge.pays);

    // nothing to judge changes nothing
    const float before = judge.precision;
    judge.score(0, 0);
    assert(judge.precision == before && judge.pays);

    // just below what starts it, it does not start; just above what stops it, it does not stop
    llama_expert_judge other;
    for (int i = 0; i < 2000; i++) {
        other.score(100, 58);
        assert(!other.pays);
    }
    other.score(100, 100);
    assert(other.pays);
    for (int i = 0; i < 2000; i++) {
        other.score(100, 58);
        assert(other.pays);
    }
    other.score(100, 0);
    assert(!other.pays);

    // experts of a call count alike, in whatever order
    llama_expert_judge one, many;
    for (int i = 0; i < 60; i++) {
        many.score(2, 1);
        one.score(1, 0);
        one.score(1, 1);
    }
    assert(std::abs(one.precision - many.precision) < 1e-6f && std::abs(many.precision - 0.5f) < 0.02f);
}

// with judge_ahead() good forecasts are read ahead and bad ones are not, and all are counted
static void test_judged(const test_file & file, llama_expert_io_mode io) {
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);
    cache.allocate(8);
    cache.judge_ahead();

    router   route(1);
    // layer 0: what is needed; layer 1: something else; layer 2: no forecast
    uint64_t n_forecasts = 0, n_needed = 0;
    for (int t = 0; t < 200; t++) {
        for (int il = 0; il < N_LAYERS; il++) {
            const auto ids    = route.token(il);
            const auto here   = cache.resident(il);
            const bool wanted = il < 2 && cache.wants_ahead(il);
            if (wanted) {
                std::vector<int> names(ids.begin(), ids.end());
                if (il == 1) {
                    names.clear();
                    for (int e = 0; e < N_EXPERT && names.size() < K; e++) {
                        if (std::find(ids.begin(), ids.end(), e) == ids.end()) {
                            names.push_back(e);
                        }
                    }
                } else {
                    n_forecasts++;
                    n_needed += std::count_if(ids.begin(), ids.end(), [&](int e) { return !here[e]; });
                }
                cache.read_ahead(il, names, 7);
                if (t % 8 == 0) {
                    std::this_thread::sleep_for(std::chrono::microseconds(500));
                }
            }
            run_call(cache, file, il, ids, K, 1);
        }
    }
    const auto good = cache.counters(0), bad = cache.counters(1), none = cache.counters(2);
    assert(good.forecasts == 200 && n_forecasts == 200 && good.forecasts_read > 150 && good.forecasts_read < 200);
    assert(good.forecast_used == good.forecast_experts && good.forecast_used == good.forecast_needed);
    assert(good.forecast_needed == n_needed && good.forecast_ns == 1400 && good.bytes_ahead > 0 && good.bytes_used > 0);
    assert(bad.forecasts > 20 && bad.forecasts < 60 && bad.forecasts_read == 0 && bad.bytes_ahead == 0);
    assert(bad.forecast_used == 0 && bad.forecast_experts > 0 && bad.forecast_needed > 0);
    assert(none.forecasts == 0 && none.forecast_experts == 0);

    // where everything has a slot there is nothing to forecast
    llama_expert_cache all(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);
    all.allocate(N_EXPERT);
    assert(all.wants_ahead(0));
    all.judge_ahead();
    assert(!all.wants_ahead(0));
}

static void test_bias() {
    typedef std::vector<int> order;

    const float             z[4] = { 4.0f, 3.0f, 2.0f, 0.0f };
    const std::vector<bool> none(4, false), two = { false, false, true, false }, last = { false, false, false, true };

    // D = 4 at the first token: 2 + 0.3 * 4 = 3.2 passes 3, 2 + 0.2 * 4 = 2.8 does not
    assert((llama_expert_bias().rank(z, two, 0.3, 1) == order{ 0, 2, 1, 3 }));
    assert((llama_expert_bias().rank(z, two, 0.2, 1) == order{ 0, 1, 2, 3 }));
    assert((llama_expert_bias().rank(z, none, 4.0, 1) == order{ 0, 1, 2, 3 }));

    // 0 + 4 * 4 = 16 passes all but those that are kept
    assert((llama_expert_bias().rank(z, last, 4.0, 0) == order{ 3, 0, 1, 2 }));
    assert((llama_expert_bias().rank(z, last, 4.0, 1) == order{ 0, 3, 1, 2 }));
    assert((llama_expert_bias().rank(z, last, 4.0, 2) == order{ 0, 1, 3, 2 }));
    assert((llama_expert_bias().rank(z, last, 4.0, 9) == order{ 0, 1, 2, 3 }));

    // D is a running mean: 4, (4 + 1) / 2, (4 + 1 + 10) / 3
    llama_expert_bias bias;
    const float       narrow[4] = { 0.0f, 1.0f, 0.5f, 0.25f };
    const float       wide[4]   = { 0.0f, -10.0f, -5.0f, -1.0f };
    bias.rank(z, none, 1.0, 1);
    assert(bias.range() == 4.0);
    // 0 + 0.3 * 2.5 = 0.75 passes 0.5
    assert((bias.rank(narrow, { true, false, false, false }, 0.3, 1) == order{ 1, 0, 2, 3 }));
    assert(bias.range() == 2.5);
    // -5 + 0.7 * 5 = -1.5 does not pass -1, -5 + 0.9 * 5 would
    assert((bias.rank(wide, two, 0.7, 1) == order{ 0, 3, 2, 1 }));
    assert(bias.range() == 5.0);

    // equal scores stay in the router's order, a score that is no number changes nothing
    const float equal[4] = { 1.0f, 1.0f, 2.0f, 1.0f };
    assert((llama_expert_bias().rank(equal, none, 1.0, 1) == order{ 2, 0, 1, 3 }));
    const float bad[4] = { 1.0f, NAN, 2.0f, 1.0f };
    assert(bias.rank(bad, two, 1.0, 1).empty());
    assert(bias.range() == 5.0);
}

// what is in the cache before a call follows from the calls, streamed ones too, not from when reads end
static void test_resident(const test_file & file, llama_expert_io_mode io) {
    for (const auto policy : { LLAMA_EXPERT_POLICY_LRU, LLAMA_EXPERT_POLICY_LFU, LLAMA_EXPERT_POLICY_NEXT_USE }) {
        std::vector<std::vector<bool>> seen[2];
        for (const int i : { 0, 1 }) {
            llama_expert_files files({ file.fd }, io);
            llama_expert_cache cache(files, file.groups, policy, 1 + i); // with more the ring of streamed calls is longer
            cache.allocate(6);
            assert(cache.resident(1) == std::vector<bool>(N_EXPERT, false));

            router       route(3);
            std::mt19937 rng(5);
            for (int call = 0; call < 60; call++) {
                const int n_tokens = call % 4 == 0 ? 1 + rng() % 20 : 1;

                std::vector<int32_t> ids;
                for (int t = 0; t < n_tokens; t++) {
                    const auto token = route.token(0);
                    ids.insert(ids.end(), token.begin(), token.end());
                }
                run_call(cache, file, 0, ids, K, 1 + i);

                const auto here = cache.resident(0);
                assert(std::count(here.begin(), here.end(), true) <= 6);
                if (n_tokens == 1) {
                    assert(std::all_of(ids.begin(), ids.end(), [&](int e) { return here[e]; }));
                }
                seen[i].push_back(here);
            }
        }
        assert(seen[0] == seen[1]);
    }
}

static void test_prefill(const test_file & file, llama_expert_io_mode io) {
    for (const auto policy : { LLAMA_EXPERT_POLICY_LRU, LLAMA_EXPERT_POLICY_LFU, LLAMA_EXPERT_POLICY_NEXT_USE }) {
        for (const int n_slots : { K, 5, 8, 12, N_EXPERT }) {
            for (const int n_readers : { 1, 4 }) {
                llama_expert_files files({ file.fd }, io);
                llama_expert_cache cache(files, file.groups, policy, n_readers);
                cache.allocate(n_slots);

                router       route(n_slots + n_readers);
                std::mt19937 rng(7);
                for (int call = 0; call < 24; call++) {
                    const int n_tokens = call % 3 == 0 ? 1 : 1 + rng() % 40;
                    for (int il = 0; il < N_LAYERS; il++) {
                        std::vector<int32_t> ids;
                        for (int t = 0; t < n_tokens; t++) {
                            const auto token = route.token(il);
                            ids.insert(ids.end(), token.begin(), token.end());
                        }
                        const size_t n_needed = std::set<int>(ids.begin(), ids.end()).size();

                        const auto before = cache.counters(il);
                        run_call(cache, file, il, ids, K, 1 + call % 3);
                        const auto after = cache.counters(il);

                        // each slice at most once per call
                        assert(after.reads - before.reads == (after.misses - before.misses) * N_TENSORS);
                        assert(after.hits - before.hits + after.misses - before.misses == n_needed);
                        assert((after.calls_streamed > before.calls_streamed) == (n_needed > (size_t) n_slots));
                    }
                }
            }
        }
    }
}

// a graph that is cut off between the ops of a call leaves nothing wrong behind
static void test_cut(const test_file & file, llama_expert_io_mode io) {
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LFU, 2);
    cache.allocate(6);

    router       route(3);
    std::mt19937 rng(5);
    for (int call = 0; call < 100; call++) {
        std::vector<int32_t> ids;
        for (int t = 0; t < 1 + (int) (rng() % 12); t++) {
            const auto token = route.token(0);
            ids.insert(ids.end(), token.begin(), token.end());
        }
        const int n_ops = 1 + rng() % N_TENSORS;
        for (int it = 0; it < n_ops; it++) {
            run_op(cache, file, 0, it, ids, K, 2);
        }
    }
}

static void test_fault(test_file & file, llama_expert_io_mode io) {
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 3);
    cache.allocate(6);

    const auto & last = file.groups[N_LAYERS - 1].tensors[N_TENSORS - 1];
    const int    il   = N_LAYERS - 1;

    std::vector<int32_t> most; // decode and, with all experts, a streamed call
    for (int e = 0; e < N_EXPERT; e++) {
        most.push_back(e);
    }
    for (const auto & ids : {
             std::vector<int32_t>{ 12, 13, 14, 15 },
             most
    }) {
        // what is in a slot needs no read
        run_call(cache, file, il, { 0, 1, 2, 3 }, K, 2);
        run_call(cache, file, il, { 4, 5, 6, 7 }, K, 2);

        assert(truncate(file.path.c_str(), last.offs + 14 * last.size + 100) == 0);
        for (int round = 0; round < 3; round++) {
            // the first tensors are whole, the last one has lost two experts
            run_op(cache, file, il, 0, ids, K, 2);
            run_op(cache, file, il, 1, ids, K, 2);
            assert(run_op(cache, file, il, 2, ids, K, 2).back() == -2);

            const std::string err = cache.last_error();
            assert(err.find(file.path) != std::string::npos);
            assert(err.find(last.name) != std::string::npos);
            assert(err.find("expert 14") != std::string::npos || err.find("expert 15") != std::string::npos);
            assert(err.find("the file ends") != std::string::npos);
        }
        file.write_out();
        run_call(cache, file, il, ids, K, 2); // the fault is gone
    }
}

static void test_flip(const test_file & file, llama_expert_io_mode io) {
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);
    cache.allocate(8);

    assert(!cache.flip_byte(0));

    const std::vector<int32_t> ids = { 3, 1, 4, 5 };
    run_call(cache, file, 0, ids, K, 1);
    assert(cache.flip_byte(0));

    int n_wrong = 0;
    run_op(cache, file, 0, 0, ids, K, 1, &n_wrong);
    assert(n_wrong == 1);
}

static void test_budget(const test_file & file, llama_expert_io_mode io) {
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 2);

    assert(cache.n_slots_min() == K && cache.n_slots_max() == N_EXPERT);
    assert(cache.n_slots_for(cache.bytes_floor() - 1) == 0);
    assert(cache.n_slots_for(cache.bytes_floor()) == K);
    for (int n = K; n < N_EXPERT; n++) {
        assert(cache.bytes_for(n) < cache.bytes_for(n + 1));
        assert(cache.n_slots_for(cache.bytes_for(n + 1) - 1) == n);
    }
    assert(cache.n_slots_for(cache.bytes_for(N_EXPERT) * 10) == N_EXPERT);

    auto groups               = file.groups;
    groups[0].tensors[0].offs = file.bytes.size() - 100;
    bool refused              = false;
    try {
        llama_expert_cache bad(files, groups, LLAMA_EXPERT_POLICY_LRU, 2);
    } catch (const std::runtime_error &) {
        refused = true;
    }
    assert(refused);
}

int main() {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);

    test_forecast();
    test_judge();
    test_bias();
    test_hot_set();
    test_readers_file();
    for (const auto io : { LLAMA_EXPERT_IO_DIRECT, LLAMA_EXPERT_IO_MMAP }) {
        for (const bool aligned : { false, true }) {
            test_file file(aligned);

            printf("%s, %s\n", llama_expert_io_mode_name(io), aligned ? "aligned" : "not aligned");
            test_budget(file, io);
            test_readers_probe(file, io);
            test_decode(file, io);
            test_ahead(file, io);
            test_ahead_fault(file, io);
            test_judged(file, io);
            test_load(file, io);
            test_load_fault(file, io);
            test_prefill(file, io);
            test_resident(file, io);
            test_cut(file, io);
            test_flip(file, io);
            test_fault(file, io);
        }
    }
    printf("OK\n");

    return 0;
}
