#include "llama-expert-checksum.h"

#include "llama-expert-cache.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

static constexpr uint64_t P1 = 0x9e3779b185ebca87ull;
static constexpr uint64_t P2 = 0xc2b2ae3d27d4eb4full;
static constexpr uint64_t P3 = 0x165667b19e3779f9ull;
static constexpr uint64_t P4 = 0x85ebca77c2b2ae63ull;
static constexpr uint64_t P5 = 0x27d4eb2f165667c5ull;

static uint64_t rotl(uint64_t x, int n) {
    return (x << n) | (x >> (64 - n));
}

// words of the file are little endian, as those of every machine that ggml runs GGUF files on
template <typename T>
static uint64_t load(const uint8_t * p) {
    T res;
    memcpy(&res, p, sizeof(res));
    return res;
}

static uint64_t mix(uint64_t acc, uint64_t word) {
    return rotl(acc + word * P2, 31) * P1;
}

uint64_t llama_expert_checksum(const void * data, size_t size) {
    const uint8_t * p   = (const uint8_t *) data;
    const uint8_t * end = p + size;

    uint64_t h = P5;
    if (size >= 32) {
        uint64_t a = P1 + P2, b = P2, c = 0, d = 0 - P1;
        for (; end - p >= 32; p += 32) {
            a = mix(a, load<uint64_t>(p));
            b = mix(b, load<uint64_t>(p + 8));
            c = mix(c, load<uint64_t>(p + 16));
            d = mix(d, load<uint64_t>(p + 24));
        }
        h = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
        for (const uint64_t acc : { a, b, c, d }) {
            h = (h ^ mix(0, acc)) * P1 + P4;
        }
    }
    h += size;
    for (; end - p >= 8; p += 8) {
        h = rotl(h ^ mix(0, load<uint64_t>(p)), 27) * P1 + P4;
    }
    for (; end - p >= 4; p += 4) {
        h = rotl(h ^ (load<uint32_t>(p) * P1), 23) * P2 + P3;
    }
    for (; p < end; p++) {
        h = rotl(h ^ (*p * P5), 11) * P1;
    }
    h = (h ^ (h >> 33)) * P2;
    h = (h ^ (h >> 29)) * P3;

    return h ^ (h >> 32);
}

llama_expert_checksums::llama_expert_checksums(const std::vector<llama_expert_group_desc> & groups) {
    for (const auto & g : groups) {
        sums.emplace_back(g.tensors.size(), std::vector<uint64_t>(g.n_expert, 0));
    }
}

size_t llama_expert_checksums::bytes() const {
    size_t res = 0;
    for (const auto & g : sums) {
        for (const auto & t : g) {
            res += sizeof(t) + t.size() * sizeof(uint64_t);
        }
    }
    return res;
}

void llama_expert_checksums::sweep(const llama_expert_files & files, const std::vector<llama_expert_group_desc> & groups, int n_threads, const progress & report) {
    struct slice {
        int group, tensor, expert;
    };

    std::vector<slice> slices;
    size_t             n_buffer = 0;
    uint64_t           n_bytes  = 0;
    for (int ig = 0; ig < (int) groups.size(); ig++) {
        for (int it = 0; it < (int) groups[ig].tensors.size(); it++) {
            for (int expert = 0; expert < groups[ig].n_expert; expert++) {
                slices.push_back({ ig, it, expert });
            }
            const size_t size = groups[ig].tensors[it].size;
            n_buffer          = std::max(n_buffer, llama_expert_files::extent(LLAMA_EXPERT_IO_ALIGN - 1, size));
            n_bytes += groups[ig].n_expert * size;
        }
    }

    std::atomic<size_t>   next{ 0 };
    std::atomic<uint64_t> n_done{ 0 };
    std::mutex            mutex;
    std::string           error;

    const auto work = [&](bool reports) {
        const std::unique_ptr<void, decltype(&free)> buffer(aligned_alloc(LLAMA_EXPERT_IO_ALIGN, n_buffer), free);
        for (size_t i = next++; i < slices.size(); i = next++) {
            const slice &                    s    = slices[i];
            const llama_expert_tensor_desc & desc = groups[s.group].tensors[s.tensor];
            const size_t                     offs = desc.offs + s.expert * desc.size;

            const std::string err = buffer ? files.read(desc.file, offs, desc.size, (uint8_t *) buffer.get()) : strerror(ENOMEM);
            if (!err.empty()) {
                std::lock_guard<std::mutex> lock(mutex);
                error = llama_expert_read_error(files, desc, s.expert, err);
                next  = slices.size();
                return;
            }
            sums[s.group][s.tensor][s.expert] = llama_expert_checksum((uint8_t *) buffer.get() + offs % LLAMA_EXPERT_IO_ALIGN, desc.size);
            n_done += desc.size;
            if (reports && report) {
                report((double) n_done / n_bytes);
            }
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; i++) {
        threads.emplace_back(work, false);
    }
    work(true);
    for (auto & thread : threads) {
        thread.join();
    }
    if (!error.empty()) {
        throw std::runtime_error("no checksums for --expert-cache-verify: " + error);
    }
    // the other threads may have ended last
    if (report) {
        report(1.0);
    }
}
