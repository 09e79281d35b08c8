#pragma once

// A file with expert tensors whose bytes are known, and ops on it as a graph makes them.

#include "../src/llama-expert-cache.h"

#undef NDEBUG
#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdio>
#include <fcntl.h>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

static constexpr int N_LAYERS  = 3;
static constexpr int N_TENSORS = 3;
static constexpr int N_EXPERT  = 16;
static constexpr int K         = 4;

static constexpr uint8_t MASK = 0x5a; // what the transform of these tests does to every byte

static inline uint8_t pattern(int layer, int tensor, int expert, size_t i) {
    uint64_t x = (((uint64_t) layer * N_TENSORS + tensor) * N_EXPERT + expert) * 0x9e3779b97f4a7c15ull + i * 0xbf58476d1ce4e5b9ull;
    return (uint8_t) (x >> 56) ^ (uint8_t) (x >> 24);
}

// a file with the expert tensors of a few layers, at odd offsets and of odd sizes unless aligned
struct test_file {
    std::string                          path;
    std::vector<llama_expert_group_desc> groups;
    std::vector<uint8_t>                 bytes;
    int                                  fd = -1;

    explicit test_file(bool aligned) {
        path = "test-expert-cache-" + std::to_string(getpid()) + ".bin";
        bytes.assign(aligned ? 4096 : 1234, 0xee);
        for (int il = 0; il < N_LAYERS; il++) {
            llama_expert_group_desc g;
            g.n_expert      = N_EXPERT;
            g.n_expert_used = K;
            for (int it = 0; it < N_TENSORS; it++) {
                llama_expert_tensor_desc t;
                t.name = "blk." + std::to_string(il) + ".t" + std::to_string(it);
                t.offs = bytes.size();
                t.size = aligned ? 8192 * (it + 1) : 5000 + 3001 * it + 96 * il;
                for (int e = 0; e < N_EXPERT; e++) {
                    for (size_t i = 0; i < t.size; i++) {
                        bytes.push_back(pattern(il, it, e, i));
                    }
                }
                g.tensors.push_back(t);
            }
            groups.push_back(g);
        }
        write_out();
        fd = open(path.c_str(), O_RDONLY);
        assert(fd >= 0);
    }

    test_file() = default;

    ~test_file() {
        if (fd >= 0) {
            close(fd);
            unlink(path.c_str());
        }
    }

    // the same file and places, tensor it of every layer transformed
    test_file with_transform(int it) const {
        test_file res;
        res.groups = groups;
        res.bytes  = bytes;
        for (auto & g : res.groups) {
            g.tensors[it].transform = true;
        }
        return res;
    }

    void write_out() const {
        FILE * f = fopen(path.c_str(), "r+b");
        if (!f) {
            f = fopen(path.c_str(), "w+b");
        }
        assert(f && fwrite(bytes.data(), 1, bytes.size(), f) == bytes.size());
        fclose(f);
    }
};

// run one op with n threads as ggml does; returns the experts that thread 0 got, or -2 at the end of a failed op
static inline std::vector<int> run_op(llama_expert_cache & cache, const test_file & file, int il, int it, const std::vector<int32_t> & ids, int n_ids, int n_threads, int * n_wrong = nullptr) {
    cache.begin(il, it, (const char *) ids.data(), n_ids, ids.size() / n_ids, sizeof(int32_t), n_ids * sizeof(int32_t), n_threads);

    std::vector<std::vector<int>> got(n_threads);
    std::atomic<int>              wrong{ 0 };

    const auto work = [&](int ith) {
        const auto &  desc = file.groups[il].tensors[it];
        const uint8_t mask = desc.transform ? MASK : 0;
        while (true) {
            const void * data   = nullptr;
            const int    expert = cache.next(ith, &data);
            if (expert == -2) {
                got[ith].push_back(-2);
            }
            if (expert < 0) {
                break;
            }
            got[ith].push_back(expert);
            const uint8_t * have   = (const uint8_t *) data;
            const uint8_t * want   = file.bytes.data() + desc.offs + expert * desc.size;
            int             differ = 0;
            for (size_t i = 0; i < desc.size; i++) {
                differ += have[i] != (want[i] ^ mask);
            }
            wrong += differ;
        }
    };
    std::vector<std::thread> threads;
    for (int ith = 1; ith < n_threads; ith++) {
        threads.emplace_back(work, ith);
    }
    work(0);
    for (auto & t : threads) {
        t.join();
    }
    if (n_wrong) {
        *n_wrong = wrong;
    } else {
        assert(wrong == 0);
    }
    const bool failed = got[0].empty() || got[0].back() == -2;
    if (!failed) {
        const std::set<int> needed(ids.begin(), ids.end());
        for (auto & g : got) {
            assert(g.size() == needed.size()); // every expert once
            assert(std::set<int>(g.begin(), g.end()) == needed);
        }
    }
    return got[0];
}

static inline void run_call(llama_expert_cache & cache, const test_file & file, int il, const std::vector<int32_t> & ids, int n_ids, int n_threads) {
    for (int it = 0; it < N_TENSORS; it++) {
        run_op(cache, file, il, it, ids, n_ids, n_threads);
    }
}

// routing with locality: a token keeps some experts of the one before it
struct router {
    std::mt19937                  rng;
    std::vector<std::vector<int>> last{ N_LAYERS };

    explicit router(int seed) : rng(seed) {}

    std::vector<int32_t> token(int il) {
        std::vector<int32_t> res;
        for (const int e : last[il]) {
            if (rng() % 2) {
                res.push_back(e);
            }
        }
        while (res.size() < K) {
            const int e = rng() % N_EXPERT;
            if (std::find(res.begin(), res.end(), e) == res.end()) {
                res.push_back(e);
            }
        }
        std::shuffle(res.begin(), res.end(), rng);
        last[il].assign(res.begin(), res.end());
        return res;
    }
};
