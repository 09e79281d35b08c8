#include "llama-expert-probe.h"

#include "llama-expert-text.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/stat.h>
#endif

static const std::string MAGIC = "remoe-edge readers 1";

static constexpr int    COUNTS[]      = { 1, 2, 4, 8, 16 };
static constexpr size_t N_ENTRIES_MAX = 64;
static constexpr size_t SIZE_MAX_FILE = 16 * 1024;
static constexpr double ROUND_S       = 0.04;
static constexpr double WITHIN        = 0.95;

std::string llama_expert_readers_path() {
    const char * own    = getenv("REMOE_EDGE_CACHE");
    const char * shared = getenv("XDG_CACHE_HOME");
    const char * home   = getenv("HOME");
    if (own && *own) {
        return std::string(own) + "/readers.txt";
    }
    if (shared && *shared == '/') {
        return std::string(shared) + "/remoe-edge/readers.txt";
    }
    return home && *home == '/' ? std::string(home) + "/.cache/remoe-edge/readers.txt" : "";
}

// a number of digits only, at pos; false if it is none or above max
static bool parse_number(const std::string & line, size_t & pos, uint64_t max, uint64_t & res) {
    const size_t start = pos;
    for (res = 0; pos < line.size() && line[pos] >= '0' && line[pos] <= '9'; pos++) {
        const uint64_t digit = line[pos] - '0';
        if (res > (max - digit) / 10) {
            return false;
        }
        res = res * 10 + digit;
    }
    return pos > start;
}

static bool parse_entry(const std::string & line, llama_expert_readers & res) {
    size_t     pos   = 0;
    const auto space = [&] { return pos < line.size() && line[pos++] == ' '; };

    uint64_t n, mb_per_s;
    if (!parse_number(line, pos, UINT64_MAX, res.device) || !space()) {
        return false;
    }
    const size_t end = line.find(' ', pos);
    res.io           = line.substr(pos, end == std::string::npos ? end : end - pos);
    pos += res.io.size();
    if ((res.io != "direct" && res.io != "mmap") || !space() || !parse_number(line, pos, 1ull << 40, res.size) || !space() ||
        !parse_number(line, pos, 16, n) || !space() || !parse_number(line, pos, 1000000, mb_per_s) || pos != line.size()) {
        return false;
    }
    res.n        = n;
    res.mb_per_s = mb_per_s;

    return std::find(std::begin(COUNTS), std::end(COUNTS), res.n) != std::end(COUNTS);
}

std::vector<llama_expert_readers> llama_expert_readers_read(const std::string & path) {
    std::string text;
    bool        missing;
    if (path.empty() || !llama_expert_text_read(path, SIZE_MAX_FILE, text, missing).empty()) {
        return {};
    }
    std::vector<llama_expert_readers> res;
    size_t                            pos = 0;
    for (int i = 0;; i++) {
        const size_t end = text.find('\n', pos);
        if (end == std::string::npos) {
            return {};
        }
        const std::string line = text.substr(pos, end - pos);
        pos                    = end + 1;
        if (i == 0) {
            if (line != MAGIC) {
                return {};
            }
        } else if (line == "end") {
            return pos == text.size() ? res : std::vector<llama_expert_readers>();
        } else {
            llama_expert_readers entry;
            if (res.size() == N_ENTRIES_MAX || !parse_entry(line, entry)) {
                return {};
            }
            res.push_back(entry);
        }
    }
}

std::string llama_expert_readers_write(const std::string & path, const std::vector<llama_expert_readers> & entries) {
    if (path.empty()) {
        return "there is no cache folder";
    }
#ifdef __linux__
    for (size_t pos = path.find('/', 1); pos != std::string::npos; pos = path.find('/', pos + 1)) {
        if (mkdir(path.substr(0, pos).c_str(), 0777) != 0 && errno != EEXIST) {
            return strerror(errno);
        }
    }
#endif
    std::string text = MAGIC + "\n";
    for (size_t i = entries.size() > N_ENTRIES_MAX ? entries.size() - N_ENTRIES_MAX : 0; i < entries.size(); i++) {
        const auto & e = entries[i];
        text += std::to_string(e.device) + " " + e.io + " " + std::to_string(e.size) + " " + std::to_string(e.n) + " " + std::to_string(e.mb_per_s) + "\n";
    }
    return llama_expert_text_write(path, text + "end\n");
}

int llama_expert_readers_choose(const std::vector<std::pair<int, double>> & rates) {
    double best = 0.0;
    for (const auto & [n, rate] : rates) {
        best = std::max(best, rate);
    }
    for (const auto & [n, rate] : rates) {
        if (rate >= WITHIN * best && rate > 0.0) {
            return n;
        }
    }
    return 0;
}

#ifdef __linux__

std::vector<std::pair<int, double>> llama_expert_readers_measure(const llama_expert_files & files, const std::vector<llama_expert_group_desc> & groups, size_t n_room) {
    typedef std::chrono::steady_clock clock;

    size_t n_buffer = 0;
    for (const auto & g : groups) {
        for (const auto & t : g.tensors) {
            n_buffer = std::max(n_buffer, t.size + 2 * LLAMA_EXPERT_IO_ALIGN);
        }
    }
    static constexpr size_t LARGE_PAGE = 2 * 1024 * 1024;

    n_buffer = (n_buffer + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;

    std::vector<std::pair<int, double>> res;
    for (const int n : COUNTS) {
        const size_t size = n * n_buffer;
        if (n > 1 && size > n_room) {
            break;
        }
        uint8_t * buffers = (uint8_t *) mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (buffers == MAP_FAILED) {
            break;
        }
        (void) madvise(buffers, size, MADV_HUGEPAGE);

        std::atomic<size_t>      n_bytes{ 0 };
        std::atomic<bool>        failed{ false };
        const auto               t_start = clock::now();
        std::vector<std::thread> threads;
        for (int i = 0; i < n; i++) {
            threads.emplace_back([&, i] {
                std::mt19937 rng(n * 100 + i);
                while (!failed.load() && std::chrono::duration<double>(clock::now() - t_start).count() < ROUND_S) {
                    const auto & g = groups[rng() % groups.size()];
                    const auto & t = g.tensors[rng() % g.tensors.size()];
                    if (!files.read(t.file, t.offs + rng() % g.n_expert * t.size, t.size, buffers + i * n_buffer).empty()) {
                        failed.store(true);
                        break;
                    }
                    n_bytes += t.size;
                }
            });
        }
        for (auto & thread : threads) {
            thread.join();
        }
        const double s = std::chrono::duration<double>(clock::now() - t_start).count();
        munmap(buffers, size);
        if (failed.load()) {
            return {};
        }
        res.emplace_back(n, n_bytes.load() / s);
        if (s > 3 * ROUND_S) {
            break; // so slow that it is busy with these
        }
    }
    return res;
}

#else

std::vector<std::pair<int, double>> llama_expert_readers_measure(const llama_expert_files &, const std::vector<llama_expert_group_desc> &, size_t) { return {}; }

#endif
