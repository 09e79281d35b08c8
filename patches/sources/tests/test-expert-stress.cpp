// Readers, evictions, streams, calls that are cut off, reading ahead, two contexts, counters and unloading, all at once
// and in bounded time. Meant to be compiled with -fsanitize=thread or address,undefined (tests/test_cache_sanitizers.py);
// without them it still compares every byte.
//
//     test-expert-stress [SECONDS]

#include "test-expert-file.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

typedef std::chrono::steady_clock clock_type;

// one of the contexts on a cache: its graphs, one after the other
static void run_context(llama_expert_cache & cache, const test_file & file, int seed, clock_type::time_point until, std::atomic<int> & n_calls, std::atomic<int> & n_failed) {
    router       route(seed);
    std::mt19937 rng(seed);
    while (clock_type::now() < until) {
        std::unique_lock<std::mutex> turn(cache.turn());

        const int n_tokens = rng() % 4 == 0 ? 1 + rng() % 12 : 1; // many: more experts than slots
        const int n_layers = rng() % 8 == 0 ? 1 + rng() % N_LAYERS : N_LAYERS;
        for (int il = 0; il < n_layers; il++) {
            std::vector<int32_t> ids;
            for (int t = 0; t < n_tokens; t++) {
                const auto token = route.token(il);
                ids.insert(ids.end(), token.begin(), token.end());
            }
            if (rng() % 2) {
                cache.read_ahead(il, { (int) (rng() % N_EXPERT), ids[0], ids[1], ids[2] });
            }
            const int n_ops  = rng() % 8 == 0 ? rng() % N_TENSORS : N_TENSORS; // a graph that is cut off
            bool      failed = false;
            for (int it = 0; it < n_ops && !failed; it++) {
                int        wrong = 0;
                const auto got   = run_op(cache, file, il, it, ids, K, 1 + rng() % 3, &wrong);
                assert(wrong == 0);
                failed = !got.empty() && got.back() == -2;
            }
            n_calls++;
            if (failed) {
                n_failed++;
                break;
            }
        }
        if (rng() % 4 == 0) {
            const auto here = cache.resident(rng() % N_LAYERS);
            assert(std::count(here.begin(), here.end(), true) <= cache.n_slots());
        }
        turn.unlock();
        if (rng() % 4 == 0) {
            std::this_thread::yield();
        }
    }
}

static void stress(const test_file & file, llama_expert_io_mode io, int n_slots, bool verify, int seed, double seconds, std::atomic<int> & n_calls, std::atomic<int> & n_failed) {
    // now and then storage is slow, fails, stops early or lies
    std::atomic<unsigned> n_reads{ 0 };
    std::atomic<bool>     faulty{ false };
    llama_expert_files    files({ file.fd }, io, [&](int fd, void * dst, size_t size, off_t offs) -> ssize_t {
        const unsigned i = n_reads++;
        if (i % 16 == 5) {
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
        if (faulty && i % 40 == 7) {
            errno = i % 80 == 7 ? EIO : EINTR;
            return -1;
        }
        const ssize_t n = ::pread(fd, dst, size, offs);
        if (verify && faulty && i % 40 == 27 && n > 0) {
            ((uint8_t *) dst)[n / 2] ^= 1;
        }
        return faulty && i % 40 == 17 ? n / 2 : n;
    });
    llama_expert_cache    cache(files, file.groups, LLAMA_EXPERT_POLICY_NEXT_USE, 3);
    if (verify) {
        cache.verify(nullptr);
    }
    cache.allocate(n_slots);
    faulty = true;

    const auto until = clock_type::now() + std::chrono::microseconds((int64_t) (seconds * 1e6));

    std::vector<std::thread> threads;
    for (int i = 0; i < 2; i++) {
        threads.emplace_back([&, i] { run_context(cache, file, 2 * seed + i, until, n_calls, n_failed); });
    }
    threads.emplace_back([&] { // who asks for metrics
        size_t n = 0;
        while (clock_type::now() < until) {
            n += cache.counters(-1).calls + strlen(cache.last_error());
            if (n % 16 == 0) {
                cache.reset_counters();
            }
            std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
    });
    for (auto & t : threads) {
        t.join();
    }
    // unloaded while the readers still work for a call that was cut off after its first op
    cache.read_ahead(1, { 0, 1, 2, 3 });
    const std::vector<int32_t> ids = { 12, 13, 14, 15 };
    cache.begin(0, 0, (const char *) ids.data(), K, 1, sizeof(int32_t), K * sizeof(int32_t), 1);
}

int main(int argc, char ** argv) {
    const double seconds = argc > 1 ? atof(argv[1]) : 2.0;

    std::atomic<int> n_calls{ 0 }, n_failed{ 0 };

    const test_file file(false);

    int n_rounds = 0;
    for (const auto io : { LLAMA_EXPERT_IO_DIRECT, LLAMA_EXPERT_IO_MMAP }) {
        for (const int n_slots : { K, 6, 9, N_EXPERT }) {
            stress(file, io, n_slots, n_rounds % 2 == 1, n_rounds, seconds / 8, n_calls, n_failed);
            n_rounds++;
        }
    }
    printf("%d caches, %d calls, %d of them failed\nOK\n", n_rounds, n_calls.load(), n_failed.load());
    assert(n_calls > n_rounds && n_failed < n_calls);

    return 0;
}
