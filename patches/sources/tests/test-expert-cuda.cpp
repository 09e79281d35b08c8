// Unit test of experts on CUDA without CUDA: the cache, the memory of its slots and the host's part in a MUL_MAT_ID run as
// they are, on a GPU that is made of threads. It computes late: what the host does too early, or frees too early, shows.

#include "../src/llama-expert-cache.h"
#include "../src/llama-expert-cuda.h"

#include "experts-calls.h"

#undef NDEBUG
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <sys/mman.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

static constexpr int N_LAYERS  = 3;
static constexpr int N_TENSORS = 3;
static constexpr int N_EXPERT  = 16;
static constexpr int K         = 4;

static constexpr size_t UNITS[N_TENSORS] = { 18, 34, 210 }; // sizes of blocks of Q4_0, Q8_0, Q6_K
static constexpr size_t PADS[N_TENSORS]  = { 0, 272, 210 };

static uint8_t pattern(int layer, int tensor, int expert, size_t i) {
    const uint64_t x = (((uint64_t) layer * N_TENSORS + tensor) * N_EXPERT + expert) * 0x9e3779b97f4a7c15ull + (i / 64 + 1) * 0xbf58476d1ce4e5b9ull;
    return ((uint8_t) (x >> 56) ^ (uint8_t) (x >> 24) ^ (uint8_t) i) | 1; // never zero, as padding is
}

// a file with expert tensors, at offsets that are no multiple of a page
struct test_file {
    std::string                          path = "test-expert-cuda-" + std::to_string(getpid()) + ".bin";
    std::vector<llama_expert_group_desc> groups;
    std::vector<uint8_t>                 bytes;
    int                                  fd = -1;

    // whole: sizes are multiples of a page, so that slots can be read in place
    explicit test_file(bool whole) {
        bytes.assign(4096 + 96, 0xee);
        for (int il = 0; il < N_LAYERS; il++) {
            llama_expert_group_desc g;
            g.n_expert      = N_EXPERT;
            g.n_expert_used = K;
            for (int it = 0; it < N_TENSORS; it++) {
                llama_expert_tensor_desc t;
                t.name = "blk." + std::to_string(il) + ".t" + std::to_string(it);
                t.offs = bytes.size();
                t.unit = whole ? (it == 2 ? 2 : UNITS[it]) : UNITS[it];
                t.size = whole ? std::lcm((size_t) 4096, t.unit) : t.unit * (40 + 3 * il);
                t.pad  = PADS[it];
                for (int e = 0; e < N_EXPERT; e++) {
                    for (size_t i = 0; i < t.size; i++) {
                        bytes.push_back(pattern(il, it, e, i));
                    }
                }
                g.tensors.push_back(t);
            }
            groups.push_back(g);
        }
        bytes.resize(bytes.size() + 5000, 0xee);
        FILE * f = fopen(path.c_str(), "wb");
        assert(f && fwrite(bytes.data(), 1, bytes.size(), f) == bytes.size());
        fclose(f);
        fd = open(path.c_str(), O_RDWR);
        assert(fd >= 0);
    }

    ~test_file() {
        close(fd);
        unlink(path.c_str());
    }
};

//
// the GPU
//

// Memory has two addresses, as on an Orin: the one of the host and the one of the device. The host's is not accessible if it
// is memory of the device, or if the kernel is to refuse direct reads into it.
struct fake_memory {
    uint8_t * host;
    uint8_t * device;
    size_t    size;
};

struct fake_gpu {
    bool integrated = true;
    bool host_ok    = true; // pinned memory can be had and read into
    bool regist_ok  = true; // memory can be registered

    std::mutex               mutex;
    std::vector<fake_memory> memories;

    std::atomic<int> n_writes{ 0 };
    int              fail_write = -1; // this copy to the device fails
};

static fake_gpu gpu;

static void * fake_alloc(ggml_backend_dev_t, enum ggml_cuda_expert_memory kind, size_t size) {
    if (kind == GGML_CUDA_EXPERT_MEMORY_REGISTERED && !gpu.regist_ok) {
        return nullptr;
    }
    size = (size + 4095) / 4096 * 4096;

    const bool reachable = kind == GGML_CUDA_EXPERT_MEMORY_REGISTERED || (kind == GGML_CUDA_EXPERT_MEMORY_HOST && gpu.host_ok);
    const int  fd        = memfd_create("gpu", 0);
    assert(fd >= 0 && ftruncate(fd, size) == 0);
    fake_memory m;
    m.host   = (uint8_t *) mmap(nullptr, size, reachable ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_SHARED, fd, 0);
    m.device = (uint8_t *) mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    m.size   = size;
    assert(m.host != MAP_FAILED && m.device != MAP_FAILED);
    close(fd);

    std::lock_guard<std::mutex> lock(gpu.mutex);
    gpu.memories.push_back(m);

    return m.host;
}

static void fake_free(ggml_backend_dev_t, enum ggml_cuda_expert_memory, void * addr, size_t) {
    std::lock_guard<std::mutex> lock(gpu.mutex);

    const auto it = std::find_if(gpu.memories.begin(), gpu.memories.end(), [&](const fake_memory & m) { return m.host == addr; });
    assert(it != gpu.memories.end());
    munmap(it->host, it->size);
    munmap(it->device, it->size);
    gpu.memories.erase(it);
}

static uint8_t * fake_address(const void * addr) {
    std::lock_guard<std::mutex> lock(gpu.mutex);

    for (const auto & m : gpu.memories) {
        if (addr >= m.host && addr < m.host + m.size) {
            return m.device + ((const uint8_t *) addr - m.host);
        }
    }
    return nullptr;
}

static const char * fake_write(ggml_backend_dev_t, void * dst, const void * src, size_t size) {
    if (gpu.n_writes++ == gpu.fail_write) {
        return "the link is down";
    }
    uint8_t * to = fake_address(dst);
    assert(to);
    memset(to, 0, size); // nobody may be reading
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    memcpy(to, src, size);

    return nullptr;
}

static const ggml_cuda_experts_i fake_cuda = {
    /* .buffer_type = */ nullptr,
    /* .buffer      = */ nullptr,
    /* .integrated  = */ [](ggml_backend_dev_t) { return gpu.integrated; },
    /* .padding     = */ nullptr,
    /* .alloc       = */ fake_alloc,
    /* .free        = */ fake_free,
    /* .write       = */ fake_write,
};

// a queue of work that is done in order, later
class fake_stream {
public:
    fake_stream() : worker([this] { work(); }) {}

    ~fake_stream() {
        put([this] { stop = true; });
        worker.join();
    }

    void put(std::function<void()> task) {
        std::lock_guard<std::mutex> lock(mutex);
        tasks.push_back(std::move(task));
        cv.notify_one();
    }

private:
    std::mutex                        mutex;
    std::condition_variable           cv;
    std::deque<std::function<void()>> tasks;
    bool                              stop = false;
    std::thread                       worker; // last: it uses the others

    void work() {
        std::mt19937 rng(7);
        while (!stop) {
            std::unique_lock<std::mutex> lock(mutex);
            cv.wait(lock, [&] { return !tasks.empty(); });
            auto task = std::move(tasks.front());
            tasks.pop_front();
            lock.unlock();
            if (rng() % 4 == 0) {
                std::this_thread::sleep_for(std::chrono::microseconds(200));
            }
            task();
        }
    }
};

struct fake_device final : ggml_cuda_expert_device {
    std::mutex              mutex;
    std::condition_variable cv;
    int                     recorded[ggml_cuda_expert_calls::N_EVENTS] = {};
    int                     done[ggml_cuda_expert_calls::N_EVENTS]     = {};

    std::vector<int32_t> ids, slots, slots_dev;

    int n_uploads  = 0;
    int fail_after = -1; // so many functions from now on the device fails, once

    bool ok() { return fail_after < 0 || fail_after-- != 0; }

    bool reserve(size_t n, int32_t ** ids, int32_t ** slots) override {
        if (!ok()) {
            return false;
        }
        this->ids.assign(n, -1);
        this->slots.assign(n, -1);
        slots_dev.assign(n, -1);
        *ids   = this->ids.data();
        *slots = this->slots.data();
        return true;
    }

    bool download(void * stream, const ggml_cuda_expert_ids & v, int32_t * dst) override {
        if (!ok()) {
            return false;
        }
        ((fake_stream *) stream)->put([v, dst] {
            for (int64_t i = 0; i < v.n_tokens; i++) {
                memcpy(dst + i * v.n_ids, (const char *) v.data + i * v.stride_token, v.n_ids * sizeof(int32_t));
            }
        });
        return true;
    }

    bool upload(void * stream, const int32_t * src, size_t n, const int32_t ** dst) override {
        n_uploads++;
        if (!ok()) {
            return false;
        }
        *dst = gpu.integrated ? src : slots_dev.data(); // an integrated GPU reads what the host has written
        if (!gpu.integrated) {
            ((fake_stream *) stream)->put([this, src, n] { std::copy(src, src + n, slots_dev.begin()); });
        }
        return true;
    }

    bool record(void * stream, int event) override {
        if (!ok()) {
            return false;
        }
        std::lock_guard<std::mutex> lock(mutex);
        const int                   n = ++recorded[event];
        ((fake_stream *) stream)->put([this, event, n] {
            std::lock_guard<std::mutex> lock(mutex);
            done[event] = std::max(done[event], n);
            cv.notify_all();
        });
        return true;
    }

    bool wait(int event) override {
        std::unique_lock<std::mutex> lock(mutex);
        cv.wait(lock, [&] { return done[event] >= recorded[event]; });
        return ok();
    }

    bool reached(int event, bool * reached) override {
        std::lock_guard<std::mutex> lock(mutex);
        *reached = done[event] >= recorded[event];
        return ok();
    }

    const void * address(const void * slot) override { return fake_address(slot); }

    std::string error() const override { return "the GPU fell off the bus"; }
};

//
// a model on that GPU
//

struct setup {
    const test_file &        file;
    llama_expert_files       files;
    llama_expert_cuda_memory memory;
    llama_expert_cache       cache;
    fake_device              device;
    ggml_cuda_expert_calls   calls;
    fake_stream              streams[2];

    ggml_tensor weights[N_LAYERS][N_TENSORS] = {};
    ggml_tensor ids[2][N_LAYERS]             = {}; // one for each context

    std::vector<int32_t> routed[2][N_LAYERS]; // what the router writes, on the device

    std::atomic<int> n_checked{ 0 };
    std::atomic<int> n_wrong{ 0 };
    uint64_t         remap_ns = 0;

    static std::vector<llama_expert_group_desc> place(const test_file & file, const llama_expert_cuda_memory & memory) {
        auto groups = file.groups;
        for (auto & g : groups) {
            for (auto & t : g.tensors) {
                t.transform = !memory.in_place() || t.size % LLAMA_EXPERT_IO_ALIGN != 0;
            }
        }
        return groups;
    }

    setup(const test_file & file, int n_slots, llama_expert_io_mode io = LLAMA_EXPERT_IO_DIRECT) : file(file), files({ file.fd }, io), memory(fake_cuda, nullptr, files), cache(files, place(file, memory), LLAMA_EXPERT_POLICY_LRU, 3), calls(source(), device) {
        cache.allocate(n_slots, &memory);
    }

    // as llama_experts has it
    ggml_cuda_expert_source source() {
        ggml_cuda_expert_source res = {};

        res.user  = this;
        res.begin = [](void * user, const ggml_tensor * op, const int32_t * ids) {
            auto *     self = (setup *) user;
            const auto at   = self->index(op->src[0]);
            const auto n    = op->src[2]->ne;
            for (int64_t i = 0; i < n[0] * n[1]; i++) {
                assert(ids[i] >= 0 && ids[i] < N_EXPERT); // the router has spoken
            }
            self->cache.begin(at.first, at.second, (const char *) ids, n[0], n[1], sizeof(int32_t), n[0] * sizeof(int32_t), 1);
            return !self->cache.streamed();
        };
        res.next  = [](void * user, bool wait, const void ** data) { return ((setup *) user)->cache.next_held(data, wait); };
        res.leave = [](void * user, int expert) { ((setup *) user)->cache.leave(expert); };
        res.slots = [](void * user, const ggml_tensor * tensor) {
            auto *                 self = (setup *) user;
            const auto             at   = self->index(tensor);
            ggml_cuda_expert_slots res;
            res.base = self->cache.slots(at.first, at.second, &res.stride);
            res.n    = self->cache.n_slots();
            return res;
        };
        res.timed = [](void * user, const ggml_tensor * op, uint64_t ids_ns, uint64_t remap_ns) {
            ((setup *) user)->cache.count_device(((setup *) user)->index(op->src[0]).first, ids_ns, remap_ns);
        };
        res.failed = [](void * user, const char * what) { ((setup *) user)->cache.set_error(what); };

        return res;
    }

    std::pair<int, int> index(const ggml_tensor * tensor) const {
        const int i = tensor - &weights[0][0];
        return { i / N_TENSORS, i % N_TENSORS };
    }

    void check(int il, int it, int expert, const uint8_t * data) {
        const auto & t = file.groups[il].tensors[it];
        n_wrong += memcmp(data, &file.bytes[t.offs + expert * t.size], t.size) != 0;
        for (size_t i = t.size; i < t.size + t.pad; i++) {
            n_wrong += data[i] != 0;
        }
        n_checked++;
    }

    // one MUL_MAT_ID as experts.cu launches it; the ids come in the order of the stream; false: it failed
    bool op(int context, int il, int it, const std::vector<int32_t> & chosen, bool one_by_one = false, int il_ids = -1) {
        fake_stream & stream = streams[context];

        il_ids = il_ids < 0 ? il : il_ids;

        ggml_tensor dst = {};
        dst.src[0]      = &weights[il][it];
        dst.src[2]      = &ids[context][il_ids];

        const ggml_cuda_expert_ids view = { routed[context][il_ids].data(), K, (int64_t) chosen.size() / K, (K + 3) * sizeof(int32_t) };
        switch (calls.begin(&stream, &dst, dst.src[2], view, one_by_one)) {
            case ggml_cuda_expert_calls::FAILED:
                return false;
            case ggml_cuda_expert_calls::SLOTS: {
                const auto   s    = calls.slots();
                const auto * base = (const uint8_t *) s.base;
                const auto * at   = calls.ids();
                assert(s.stride % file.groups[il].tensors[it].unit == 0);
                const auto kernel = [this, il, it, chosen, base, s](const int32_t * at) {
                    for (size_t i = 0; i < chosen.size(); i++) {
                        const int slot = at[i];
                        if (slot < 0 || slot >= s.n) {
                            n_wrong++;
                            continue;
                        }
                        check(il, it, chosen[i], base + slot * s.stride);
                    }
                };
                kernel(device.slots.data()); // nothing is launched before its bytes are there, however late it runs
                stream.put([kernel, at] { kernel(at); });
            } break;
            case ggml_cuda_expert_calls::STREAM: {
                std::set<int> left(chosen.begin(), chosen.end());
                const void *  data;
                int           expert;
                while ((expert = calls.next(&data)) >= 0) {
                    assert(left.erase(expert) == 1); // each once
                    const auto kernel = [this, il, it, expert, data] { check(il, it, expert, (const uint8_t *) data); };
                    kernel();
                    stream.put(kernel);
                }
                assert(expert == -2 || left.empty());
            } break;
        }
        return calls.end();
    }

    // a layer of a graph: its router, then its three ops
    bool layer(int context, int il, const std::vector<int32_t> & chosen, bool one_by_one = false, std::vector<int> followers = {}) {
        const size_t n = chosen.size() / K;
        if (routed[context][il].size() < n * (K + 3)) {
            finish(context);
            routed[context][il].resize(n * (K + 3));
        }
        ids[context][il].ne[0] = K;
        ids[context][il].ne[1] = n;
        auto * dst             = routed[context][il].data();
        streams[context].put([dst, chosen, n] {
            for (size_t i = 0; i < n; i++) {
                std::copy(&chosen[i * K], &chosen[i * K] + K, dst + i * (K + 3));
            }
        });
        if (followers.empty()) {
            followers = { il };
        }
        for (const int follower : followers) {
            for (int it = 0; it < N_TENSORS; it++) {
                if (!op(context, follower, it, chosen, one_by_one, il)) {
                    return false;
                }
            }
        }
        // later nodes reuse the memory of the ids
        streams[context].put([dst, n] { std::fill(dst, dst + n * (K + 3), -1); });
        return true;
    }

    void finish(int context) {
        std::mutex              mutex;
        std::condition_variable cv;
        bool                    done = false;
        streams[context].put([&] {
            std::lock_guard<std::mutex> lock(mutex);
            done = true;
            cv.notify_all();
        });
        std::unique_lock<std::mutex> lock(mutex);
        cv.wait(lock, [&] { return done; });
    }

    void assert_right(int n_at_least) {
        finish(0);
        finish(1);
        if (n_wrong != 0 || n_checked < n_at_least) {
            fprintf(stderr, "%d experts or bytes of padding are wrong, %d experts were checked, of at least %d\n", n_wrong.load(), n_checked.load(), n_at_least);
            abort();
        }
        n_checked = 0;
    }
};

static std::vector<int32_t> some_tokens(std::mt19937 & rng, int n_tokens) {
    std::vector<int32_t> res;
    for (int i = 0; i < n_tokens; i++) {
        std::vector<int32_t> all(N_EXPERT);
        std::iota(all.begin(), all.end(), 0);
        std::shuffle(all.begin(), all.end(), rng);
        res.insert(res.end(), all.begin(), all.begin() + K);
    }
    return res;
}

static constexpr int N_TOKENS = 8;

static void test_decode(const test_file & file) {
    for (const int n_slots : { K, 7, N_EXPERT }) {
        for (const bool one_by_one : { false, true }) {
            if (one_by_one && n_slots != 7) {
                continue;
            }
            setup        s(file, n_slots);
            std::mt19937 rng(n_slots);

            // the same calls without a device
            llama_expert_files files({ file.fd }, LLAMA_EXPERT_IO_DIRECT);
            auto               groups = file.groups;
            for (auto & g : groups) {
                for (auto & t : g.tensors) {
                    t.unit = t.pad = 0;
                }
            }
            llama_expert_cache plain(files, groups, LLAMA_EXPERT_POLICY_LRU, 3);
            plain.allocate(n_slots);

            for (int t = 0; t < N_TOKENS; t++) {
                s.calls.begin_graph();
                for (int il = 0; il < N_LAYERS; il++) {
                    const auto chosen = some_tokens(rng, 1);
                    assert(s.layer(0, il, chosen, one_by_one));
                    for (int it = 0; it < N_TENSORS; it++) {
                        const void * data;
                        plain.begin(il, it, (const char *) chosen.data(), K, 1, sizeof(int32_t), 0, 1);
                        while (plain.next(0, &data) >= 0) {
                        }
                    }
                }
            }
            s.assert_right(N_TOKENS * N_LAYERS * N_TENSORS * K);

            const auto c = s.cache.counters(-1);
            const auto p = plain.counters(-1);
            assert(c.hits == p.hits && c.misses == p.misses && c.evictions == p.evictions && c.bytes_demand == p.bytes_demand);
            assert(c.calls == N_TOKENS * N_LAYERS && c.calls_streamed == 0);
            assert(c.ids_ns > 0 && c.remap_ns > 0);
            assert(n_slots == N_EXPERT || c.evictions > 0);
            assert(s.device.n_uploads == (one_by_one ? 0 : N_TOKENS * N_LAYERS)); // once per call, not per op
        }
    }
}

static void test_prefill(const test_file & file) {
    for (const int n_slots : { K, 9, N_EXPERT }) {
        setup        s(file, n_slots);
        std::mt19937 rng(n_slots);
        for (int t = 0; t < 4; t++) {
            const int n_tokens = t % 2 ? 1 : 20;
            s.calls.begin_graph();
            for (int il = 0; il < N_LAYERS; il++) {
                assert(s.layer(0, il, some_tokens(rng, n_tokens)));
            }
        }
        s.assert_right(4 * N_LAYERS * N_TENSORS * K);

        const auto c = s.cache.counters(-1);
        assert(c.calls_streamed == (n_slots < N_EXPERT ? 2 * N_LAYERS : 0));
    }
}

// two contexts take turns at submitting graphs, and do not wait for them to end
static void test_two_streams(const test_file & file) {
    for (const int n_slots : { K, 6 }) {
        setup        s(file, n_slots);
        std::mt19937 rng(n_slots);
        for (int t = 0; t < 16; t++) {
            s.calls.begin_graph();
            for (int il = 0; il < N_LAYERS; il++) {
                assert(s.layer(t % 2, il, some_tokens(rng, t % 7 == 3 ? 5 : 1)));
            }
        }
        s.assert_right(16 * N_LAYERS * N_TENSORS * K);
    }
}

// two groups of experts follow the same ids, and have them in different slots
static void test_shared_ids(const test_file & file) {
    setup        s(file, 7);
    std::mt19937 rng(5);
    for (int t = 0; t < 6; t++) {
        const auto chosen = some_tokens(rng, 1);
        s.calls.begin_graph();
        assert(s.layer(0, 1, some_tokens(rng, 1))); // so that layers 0 and 1 have different experts
        assert(s.layer(0, 0, chosen, false, { 0, 1 }));
    }
    s.assert_right(6 * 3 * N_TENSORS * K);
}

// a read error ends the op, names its place, and the next call works
static void test_read_error(const test_file & file) {
    for (const int n_tokens : { 1, 20 }) {
        setup        s(file, K);
        std::mt19937 rng(3);
        s.calls.begin_graph();
        assert(s.layer(0, 0, some_tokens(rng, n_tokens)));

        std::vector<uint8_t> tail(file.bytes.size() - file.groups[1].tensors[1].offs);
        assert(pread(file.fd, tail.data(), tail.size(), file.bytes.size() - tail.size()) == (ssize_t) tail.size());
        assert(ftruncate(file.fd, file.bytes.size() - tail.size()) == 0);
        const bool ok = s.layer(0, 1, some_tokens(rng, n_tokens));
        assert(pwrite(file.fd, tail.data(), tail.size(), file.bytes.size() - tail.size()) == (ssize_t) tail.size());

        assert(!ok);
        const std::string err = s.cache.last_error();
        assert(err.find("blk.1.t") != std::string::npos && err.find("the file ends") != std::string::npos);

        for (int t = 0; t < 2; t++) {
            s.calls.begin_graph();
            for (int il = 0; il < N_LAYERS; il++) {
                assert(s.layer(0, il, some_tokens(rng, n_tokens)));
            }
        }
        s.assert_right(1);
    }
}

// a copy to the device fails
static void test_copy_error(const test_file & file) {
    for (const int n_tokens : { 1, 20 }) {
        setup        s(file, K);
        std::mt19937 rng(3);
        gpu.fail_write = gpu.n_writes + 2;
        s.calls.begin_graph();
        assert(!s.layer(0, 0, some_tokens(rng, n_tokens)));
        gpu.fail_write = -1;

        const std::string err = s.cache.last_error();
        assert(err.find("blk.0.t") != std::string::npos && err.find("cannot copy to the device: the link is down") != std::string::npos);
        s.calls.begin_graph();
        assert(s.layer(0, 0, some_tokens(rng, n_tokens)));
        s.assert_right(1);
    }
}

// whichever function of the device fails: the op fails with its words, nothing hangs, and the next graph works
static void test_device_error(const test_file & file) {
    for (const int n_tokens : { 1, 20 }) {
        int n_failed = 0;
        for (int n = 0; n < 24; n++) {
            setup        s(file, K);
            std::mt19937 rng(n);
            s.device.fail_after = n;
            s.calls.begin_graph();
            bool ok = true;
            for (int il = 0; ok && il < N_LAYERS; il++) {
                ok = s.layer(0, il, some_tokens(rng, n_tokens));
            }
            if (!ok) {
                n_failed++;
                assert(std::string(s.cache.last_error()) == "the GPU fell off the bus");
            }
            s.device.fail_after = -1;
            s.finish(0);
            s.n_wrong = 0; // a graph that failed has no result
            s.calls.begin_graph();
            for (int il = 0; il < N_LAYERS; il++) {
                assert(s.layer(0, il, some_tokens(rng, n_tokens)));
            }
            s.assert_right(1);
        }
        assert(n_failed >= 20);
    }
}

static void test_flip(const test_file & file) {
    setup        s(file, N_EXPERT);
    std::mt19937 rng(1);
    const auto   chosen = some_tokens(rng, 1);
    s.calls.begin_graph();
    assert(s.layer(0, 0, chosen));
    s.assert_right(1);

    const bool can = s.memory.in_place() && file.groups[0].tensors[0].size % LLAMA_EXPERT_IO_ALIGN == 0;
    assert(s.cache.flip_byte(0) == can);
    s.calls.begin_graph();
    assert(s.layer(0, 0, chosen));
    s.finish(0);
    assert((s.n_wrong > 0) == can);
}

int main() {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);

    struct machine {
        const char * name;
        bool         integrated, host_ok, regist_ok;
        const char * memory;
    };

    const machine machines[] = {
        { "integrated",                            true,  true,  true,  "pinned memory that the GPU reads in place"     },
        { "integrated, no direct reads",           true,  false, true,  "registered memory that the GPU reads in place" },
        { "integrated, no direct reads, no pages", true,  false, false, "device memory, copied from pageable memory"    },
        { "discrete",                              false, true,  true,  "device memory, copied from pinned memory"      },
        { "discrete, nothing pinned",              false, false, false, "device memory, copied from pageable memory"    },
    };
    for (const auto & m : machines) {
        gpu.integrated = m.integrated;
        gpu.host_ok    = m.host_ok;
        gpu.regist_ok  = m.regist_ok;
        for (const bool whole : { true, false }) {
            printf("%s, experts of %s pages\n", m.name, whole ? "whole" : "broken");

            test_file file(whole);
            {
                setup s(file, K);
                assert(strcmp(s.memory.description(), m.memory) == 0);
                assert(s.cache.transforms() == (!s.memory.in_place() || !whole));
            }
            test_decode(file);
            test_prefill(file);
            test_two_streams(file);
            test_shared_ids(file);
            test_read_error(file);
            if (strncmp(m.memory, "device", 6) == 0) {
                test_copy_error(file);
            }
            if (whole) {
                test_device_error(file);
            }
            test_flip(file);
            assert(gpu.memories.empty()); // all of it was freed
        }
    }
    printf("OK\n");

    return 0;
}
