#include "llama-expert-io.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifdef __linux__
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

const char * llama_expert_io_mode_name(llama_expert_io_mode mode) {
    switch (mode) {
        case LLAMA_EXPERT_IO_AUTO: return "auto";
        case LLAMA_EXPERT_IO_DIRECT: return "direct";
        case LLAMA_EXPERT_IO_MMAP: return "mmap";
    }
    return "unknown";
}

static size_t align_down(size_t x) {
    return x & ~(LLAMA_EXPERT_IO_ALIGN - 1);
}

static size_t align_up(size_t x) {
    return align_down(x + LLAMA_EXPERT_IO_ALIGN - 1);
}

size_t llama_expert_files::extent(size_t offs, size_t size) {
    return align_up(offs + size) - align_down(offs);
}

#ifdef __linux__

// pread until at least need bytes are there; a file that ends earlier is an error, never zeros
// (direct: the descriptor has O_DIRECT, a read that stopped inside a block goes on from the start of that block)
std::string llama_expert_files::read_at_least(int fd, bool direct, uint8_t * dst, size_t size, size_t offs, size_t need) const {
    static constexpr int MAX_INTERRUPTS = 1000; // in a row: signals that come faster than storage answers

    size_t have         = 0;
    int    n_interrupts = 0;
    while (true) {
        const size_t  start = direct ? align_down(have) : have;
        const ssize_t n     = pread(fd, dst + start, size - start, offs + start);
        if (n < 0) {
            if (errno == EINTR && ++n_interrupts < MAX_INTERRUPTS) {
                continue;
            }
            return strerror(errno);
        }
        n_interrupts = 0;
        if (start + n >= need) {
            return "";
        }
        if (start + n <= have) {
            struct stat st;
            const bool  ended = fstat(fd, &st) == 0 && (size_t) st.st_size < offs + need;
            return (ended ? "the file ends after " : "storage stopped after ") + std::to_string(have) + " of " + std::to_string(need) + " bytes";
        }
        have = start + n;
    }
}

llama_expert_files::llama_expert_files(llama_expert_io_mode mode, llama_expert_pread pread) : io_mode(mode), pread(pread ? std::move(pread) : ::pread) {}

llama_expert_files::llama_expert_files(const std::vector<int> & fds, llama_expert_io_mode mode, llama_expert_pread pread) : llama_expert_files(mode, std::move(pread)) {
    bool        direct = mode != LLAMA_EXPERT_IO_MMAP;
    std::string why;

    for (const int fd : fds) {
        files.emplace_back();
        llama_expert_file & file = files.back();

        // the link in /proc names the open file itself, whatever has happened to its path since
        const std::string link = "/proc/self/fd/" + std::to_string(fd);

        char          name[4096];
        const ssize_t n = readlink(link.c_str(), name, sizeof(name));
        file.name       = n > 0 ? std::string(name, n) : link;

        file.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);

        struct stat st;
        if (file.fd < 0 || fstat(file.fd, &st) != 0) {
            throw std::runtime_error(file.name + ": " + strerror(errno));
        }
        file.size   = st.st_size;
        file.device = st.st_dev;

        struct statfs fs;
        file.in_memory = fstatfs(fd, &fs) == 0 && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);

        if (direct) {
            file.fd_direct = open(link.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
            if (file.fd_direct < 0) {
                direct = false;
                why    = file.name + ": " + strerror(errno);
            }
        }
    }

    if (direct) {
        // some file systems accept O_DIRECT at open and refuse it at the first read
        void * probe = mmap(nullptr, LLAMA_EXPERT_IO_ALIGN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (const auto & file : files) {
            if (probe == MAP_FAILED || ::pread(file.fd_direct, probe, LLAMA_EXPERT_IO_ALIGN, 0) <= 0) {
                direct = false;
                why    = file.name + ": " + strerror(errno);
                break;
            }
        }
        if (probe != MAP_FAILED) {
            munmap(probe, LLAMA_EXPERT_IO_ALIGN);
        }
    }

    if (!direct && mode == LLAMA_EXPERT_IO_DIRECT) {
        throw std::runtime_error("direct reads are not possible here (" + why + "), use --expert-cache-io mmap");
    }
    io_mode = direct ? LLAMA_EXPERT_IO_DIRECT : LLAMA_EXPERT_IO_MMAP;
}

llama_expert_files::~llama_expert_files() {
    for (const auto & file : files) {
        if (file.fd >= 0) {
            close(file.fd);
        }
        if (file.fd_direct >= 0) {
            close(file.fd_direct);
        }
    }
}

std::string llama_expert_files::read_direct(const llama_expert_file & file, size_t offs, size_t size, uint8_t * dst) const {
    const size_t first = align_down(offs);

    return read_at_least(file.fd_direct, true, dst, extent(offs, size), first, offs - first + size);
}

std::string llama_expert_files::read_mmap(const llama_expert_file & file, size_t offs, size_t size, uint8_t * dst) const {
    const size_t first = align_down(offs);
    const size_t len   = extent(offs, size);

    // A mapping alone would fault page by page, at a tenth of the speed of the storage. Populating it reads the range
    // as a whole and reports a page that cannot be had (kernels before 5.14 do not know it, then pread does the reading).
    void * addr = mmap(nullptr, len, PROT_READ, MAP_SHARED, file.fd, first);
    if (addr != MAP_FAILED) {
        (void) madvise(addr, len, MADV_POPULATE_READ);
    }

    // the copy goes through pread and not through the mapping: a file that was truncated is an error then, not a SIGBUS
    const std::string err = read_at_least(file.fd, false, dst + (offs - first), size, offs, size);

    if (addr != MAP_FAILED) {
        munmap(addr, len);
    }
    // the slot holds the bytes now, a second copy in the page cache would only push out other pages
    (void) posix_fadvise(file.fd, first, len, POSIX_FADV_DONTNEED);

    return err;
}

std::string llama_expert_files::read(int file, size_t offs, size_t size, uint8_t * dst) const {
    const auto & f = files[file];

    return io_mode == LLAMA_EXPERT_IO_DIRECT ? read_direct(f, offs, size, dst) : read_mmap(f, offs, size, dst);
}

#else

llama_expert_files::llama_expert_files(const std::vector<int> &, llama_expert_io_mode mode, llama_expert_pread) : io_mode(mode) {
    throw std::runtime_error("the expert cache needs Linux");
}

llama_expert_files::~llama_expert_files() = default;

std::string llama_expert_files::read_direct(const llama_expert_file &, size_t, size_t, uint8_t *) const { return "not supported"; }
std::string llama_expert_files::read_mmap(const llama_expert_file &, size_t, size_t, uint8_t *) const { return "not supported"; }
std::string llama_expert_files::read(int, size_t, size_t, uint8_t *) const { return "not supported"; }

#endif
