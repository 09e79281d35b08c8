// Every read of a decode, of a prefill and of reading ahead fails, in every way in which a read can fail, once and until
// further notice. What stands in the place of pread answers from memory, so that thousands of runs take seconds; a
// preloaded library does the same to the reads of a whole runtime (tests/test_runtime_faults.py).

#include "test-expert-file.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <regex>
#include <stdexcept>

enum fault_kind {
    FAULT_EIO,
    FAULT_ENOMEM,
    FAULT_EINTR,
    FAULT_ZERO,  // the end of a file that does not end there
    FAULT_SHORT, // half of the bytes
    FAULT_SLOW,
    FAULT_WRONG, // all bytes, one of them wrong
    N_FAULTS,
};

// how an error must end, nullptr: no error is allowed
static const char * reason(fault_kind kind, bool persistent, llama_expert_io_mode io) {
    switch (kind) {
        case FAULT_EIO: return "Input/output error";
        case FAULT_ENOMEM: return "Cannot allocate memory";
        case FAULT_EINTR: return persistent ? "Interrupted system call" : nullptr;
        case FAULT_ZERO: return "storage stopped after ";
        // half of the last block, again and again: a direct read cannot go on from there
        case FAULT_SHORT: return persistent && io == LLAMA_EXPERT_IO_DIRECT ? "storage stopped after " : nullptr;
        case FAULT_WRONG: return persistent ? "the bytes are not those that were there when the model was loaded, twice" : nullptr;
        default: return nullptr;
    }
}

// stands in the place of pread
struct faulty_storage {
    const std::vector<uint8_t> & bytes; // of the file

    std::mutex       mutex;
    fault_kind       kind       = FAULT_EIO;
    bool             persistent = false;
    int              at         = -1; // the read that fails, and all after it if persistent; -1: none
    int              n_reads    = 0;
    int              n_fired    = 0;
    std::set<size_t> hit; // offsets of reads that failed

    explicit faulty_storage(const std::vector<uint8_t> & bytes) : bytes(bytes) {}

    void arm(fault_kind k, int n, bool p) {
        std::lock_guard<std::mutex> lock(mutex);
        kind       = k;
        at         = n;
        persistent = p;
        n_reads    = 0;
        n_fired    = 0;
        hit.clear();
    }

    ssize_t copy(void * dst, size_t size, size_t offs) const {
        const size_t n = std::min(size, bytes.size() - std::min(offs, bytes.size()));
        memcpy(dst, bytes.data() + offs, n);
        return n;
    }

    llama_expert_pread pread() {
        return [this](int /*fd*/, void * dst, size_t size, off_t offs) -> ssize_t {
            {
                std::lock_guard<std::mutex> lock(mutex);
                const int                   i = n_reads++;
                if (at < 0 || i < at || (i > at && !persistent)) {
                    return copy(dst, size, offs);
                }
                n_fired++;
                hit.insert(offs);
            }
            switch (kind) {
                case FAULT_EIO: errno = EIO; return -1;
                case FAULT_ENOMEM: errno = ENOMEM; return -1;
                case FAULT_EINTR: errno = EINTR; return -1;
                case FAULT_ZERO: return 0;
                case FAULT_SLOW: std::this_thread::sleep_for(std::chrono::microseconds(persistent ? 100 : 2000)); break;
                default: break;
            }
            const ssize_t n = copy(dst, size, offs);
            if (kind == FAULT_SHORT && n > 1) {
                return n / 2;
            }
            if (kind == FAULT_WRONG && n > 0) {
                ((uint8_t *) dst)[n / 2] ^= 0x10;
            }
            return n;
        };
    }
};

enum phase {
    PHASE_DECODE,
    PHASE_PREFILL, // more experts than slots
    PHASE_AHEAD,   // decode, with experts read ahead, some of them not needed
    N_PHASES,
};

static const char * const PHASE_NAMES[N_PHASES] = { "decode", "prefill", "reading ahead" };

// The same calls each time; ends at the first op that fails, as a graph does. Returns the layer of that op, -1: none.
static int run_graphs(llama_expert_cache & cache, const test_file & file, phase phase, int * n_wrong) {
    std::mt19937 rng(11);

    *n_wrong = 0;
    for (int call = 0; call < (phase == PHASE_PREFILL ? 1 : phase == PHASE_DECODE ? 2
                                                                                  : 3);
        call++) {
        for (int il = 0; il < 2; il++) {
            std::vector<int32_t> ids;
            while (ids.size() < (phase == PHASE_PREFILL ? 5 : 1) * K) {
                const int e = rng() % N_EXPERT;
                if (std::find(ids.end() - ids.size() % K, ids.end(), e) == ids.end()) {
                    ids.push_back(e);
                }
            }
            if (phase == PHASE_AHEAD) {
                cache.read_ahead(il, { ids[0], ids[2], (int) (rng() % N_EXPERT) });
                std::this_thread::sleep_for(std::chrono::microseconds(100));
            }
            for (int it = 0; it < N_TENSORS; it++) {
                int        wrong = 0;
                const auto got   = run_op(cache, file, il, it, ids, K, 1 + it % 2, &wrong);
                *n_wrong += wrong;
                if (!got.empty() && got.back() == -2) {
                    return il;
                }
            }
        }
    }
    return -1;
}

// the error names what the storage was asked for, and the expert is in no slot
static void check_error(llama_expert_cache & cache, const test_file & file, faulty_storage & storage, const char * why) {
    const std::string err = cache.last_error();

    std::smatch m;
    const bool  ok = std::regex_match(err, m, std::regex("(.*): cannot read tensor blk\\.(\\d)\\.t(\\d), expert (\\d+), offset (\\d+), (\\d+) bytes: (.*)"));
    if (!ok || m[7].str().compare(0, strlen(why), why) != 0) {
        printf("unexpected error, not '%s': %s\n", why, err.c_str());
        abort();
    }
    const int    il     = std::stoi(m[2]);
    const int    expert = std::stoi(m[4]);
    const size_t offs   = std::stoull(m[5]);
    const auto & desc   = file.groups[il].tensors[std::stoi(m[3])];
    assert(m[1].str().find(file.path) != std::string::npos);
    assert(offs == desc.offs + expert * desc.size && std::stoull(m[6]) == desc.size);

    const auto first = storage.hit.lower_bound(offs - offs % LLAMA_EXPERT_IO_ALIGN);
    assert(first != storage.hit.end() && *first < offs + desc.size);

    assert(!cache.resident(il)[expert]);
}

static void test_every_read(const test_file & file, llama_expert_io_mode io, phase phase, bool verify) {
    int n_tried = 0, n_errors = 0;
    for (int kind = 0; kind < N_FAULTS; kind++) {
        if (verify && kind != FAULT_EIO && kind != FAULT_WRONG) {
            continue;
        }
        for (const bool persistent : { false, true }) {
            faulty_storage     storage{ file.bytes };
            llama_expert_files files({ file.fd }, io, storage.pread());
            llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 3);
            if (verify) {
                cache.verify(nullptr);
            }
            cache.allocate(phase == PHASE_DECODE ? K : 6);

            const char * why       = reason((fault_kind) kind, persistent, io);
            const bool   ambiguous = phase == PHASE_AHEAD || kind == FAULT_SHORT; // what was read ahead may not be needed

            int wrong = 0;
            assert(run_graphs(cache, file, phase, &wrong) == -1 && wrong == 0);
            for (int n = 0;; n++) {
                assert(n < 1000);
                storage.arm((fault_kind) kind, n, persistent);
                int        failed = run_graphs(cache, file, phase, &wrong);
                const bool fired  = storage.n_fired > 0;
                if (kind == FAULT_WRONG && !verify) {
                    // without checksums nothing can be seen but by the bytes themselves: this test does see them
                    assert(failed == -1 && (!fired || wrong > 0 || phase == PHASE_AHEAD));
                } else {
                    assert(wrong == 0); // no byte of a read that failed was used
                    assert(failed == -1 || (fired && why));
                    assert(failed != -1 || !fired || !why || ambiguous);
                }
                for (int again = 0; again < 2 && failed != -1; again++) {
                    check_error(cache, file, storage, why);
                    n_errors += again == 0;
                    if (!persistent) {
                        break;
                    }
                    failed = run_graphs(cache, file, phase, &wrong); // as long as the fault is there
                    assert(wrong == 0 && failed != -1);
                }
                if (kind == FAULT_WRONG && verify && fired && !persistent && phase != PHASE_AHEAD) {
                    assert(cache.counters(-1).reads_wrong > 0);
                    cache.reset_counters();
                }
                storage.arm((fault_kind) kind, -1, false);
                if (kind == FAULT_WRONG && !verify) {
                    // wrong bytes stay where they are: other experts take all slots
                    for (int il = 0; il < 2; il++) {
                        run_op(cache, file, il, 0, { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }, 16, 1, &wrong);
                    }
                    break; // every read of the others would only show the same
                }
                assert(run_graphs(cache, file, phase, &wrong) == -1 && wrong == 0); // the fault is gone
                if (!fired) {
                    break;
                }
                n_tried++;
            }
        }
    }
    printf("  %s%s: %d faults, %d errors, the others had no effect\n", PHASE_NAMES[phase], verify ? ", verified" : "", n_tried, n_errors);
    assert(n_tried > (verify ? 80 : 250) && n_errors > 40);
}

// the reads by which checksums are taken
static void test_sweep(const test_file & file, llama_expert_io_mode io) {
    for (const int n : { 0, 1, 50, N_LAYERS * N_TENSORS * N_EXPERT - 1 }) {
        faulty_storage     storage{ file.bytes };
        llama_expert_files files({ file.fd }, io, storage.pread());
        llama_expert_cache cache(files, file.groups, LLAMA_EXPERT_POLICY_LRU, 3);

        const size_t before = cache.bytes_floor();
        double       done   = 0;
        cache.verify([&done](double x) { done = x; });
        assert(cache.bytes_floor() >= before + sizeof(uint64_t) * N_LAYERS * N_TENSORS * N_EXPERT);

        storage.arm(FAULT_EIO, n, false);
        std::string err;
        try {
            cache.allocate(6);
        } catch (const std::runtime_error & e) {
            err = e.what();
        }
        assert(err.find("no checksums for --expert-cache-verify: ") == 0 && err.find(file.path + ": cannot read tensor blk.") != std::string::npos);

        storage.arm(FAULT_EIO, -1, false);
        cache.allocate(6);
        assert(storage.n_reads == N_LAYERS * N_TENSORS * N_EXPERT && done == 1.0);
        run_call(cache, file, 0, { 1, 2, 3, 4 }, K, 2);
    }
}

// a file that is overwritten under the run: found with checksums, also where an expert is transformed, and fine again
// once the bytes are back
static void test_overwritten(test_file & file, llama_expert_io_mode io) {
    const test_file    transformed = file.with_transform(1);
    llama_expert_files files({ file.fd }, io);
    llama_expert_cache cache(files, transformed.groups, LLAMA_EXPERT_POLICY_LRU, 2, [&](int group, int tensor, const uint8_t * src, uint8_t * dst) {
        for (size_t i = 0; i < transformed.groups[group].tensors[tensor].size; i++) {
            dst[i] = src[i] ^ MASK;
        }
    });
    cache.verify(nullptr);
    cache.allocate(K);

    for (int it = 0; it < N_TENSORS; it++) {
        const auto & desc = file.groups[1].tensors[it];
        uint8_t &    byte = file.bytes[desc.offs + 9 * desc.size + 77];

        run_call(cache, transformed, 1, { 0, 1, 2, 3 }, K, 2);
        byte ^= 1;
        file.write_out();
        byte ^= 1;
        for (int i = 0; i < N_TENSORS; i++) {
            assert((run_op(cache, transformed, 1, i, { 9, 1, 2, 3 }, K, 2).back() == -2) == (i == it));
            if (i == it) {
                break;
            }
        }
        const std::string err = cache.last_error();
        assert(err.find(desc.name + ", expert 9, offset " + std::to_string(desc.offs + 9 * desc.size)) != std::string::npos);
        assert(err.find("the bytes are not those") != std::string::npos);
        file.write_out();
        run_call(cache, transformed, 1, { 9, 1, 2, 3 }, K, 2);
    }
}

static void test_checksum() {
    const auto of = [](const std::string & s) { return llama_expert_checksum(s.data(), s.size()); };
    assert(of("") == 0xef46db3751d8e999ull);
    assert(of("abc") == 0x44bc2cf5ad770999ull);
    assert(of("The quick brown fox jumps over the lazy dog") == 0x0b242d361fda71bcull);

    std::vector<uint8_t> data(3 << 20, 0x55);
    const uint64_t       whole = llama_expert_checksum(data.data(), data.size());
    std::mt19937         rng(1);
    for (int i = 0; i < 50; i++) {
        uint8_t & byte = data[rng() % data.size()];
        byte ^= 1 << i % 8;
        assert(llama_expert_checksum(data.data(), data.size()) != whole);
        byte ^= 1 << i % 8;
    }
    const auto t_start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20; i++) {
        assert(llama_expert_checksum(data.data(), data.size()) == whole);
    }
    const double t = std::chrono::duration<double>(std::chrono::steady_clock::now() - t_start).count();
    printf("checksums: %.1f GB/s\n", 20 * data.size() / t / 1e9);
}

int main() {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);

    test_checksum();
    for (const auto io : { LLAMA_EXPERT_IO_DIRECT, LLAMA_EXPERT_IO_MMAP }) {
        test_file file(false);

        printf("%s\n", llama_expert_io_mode_name(io));
        for (const auto phase : { PHASE_DECODE, PHASE_PREFILL, PHASE_AHEAD }) {
            test_every_read(file, io, phase, false);
            if (io == LLAMA_EXPERT_IO_DIRECT) {
                test_every_read(file, io, phase, true); // the same in both
            }
        }
        test_sweep(file, io);
        test_overwritten(file, io);
    }
    printf("OK\n");

    return 0;
}
