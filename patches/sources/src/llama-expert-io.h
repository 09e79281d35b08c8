#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdint>
#include <functional>
#include <string>
#include <sys/types.h>
#include <vector>

// Reads of expert weights from the files of a model.

enum llama_expert_io_mode {
    LLAMA_EXPERT_IO_AUTO,
    LLAMA_EXPERT_IO_DIRECT, // O_DIRECT: storage to slot without a copy and without the page cache
    LLAMA_EXPERT_IO_MMAP,   // through the page cache: pages are faulted in as one range, copied, released
};

const char * llama_expert_io_mode_name(llama_expert_io_mode mode);

// direct reads start and end on multiples of this (the logical block of the devices in use is 512 or 4096)
static constexpr size_t LLAMA_EXPERT_IO_ALIGN = 4096;

// pread(2), or what a test puts in its place: every read of an expert goes through one of these
typedef std::function<ssize_t(int fd, void * dst, size_t size, off_t offs)> llama_expert_pread;

// one file of the model (a split GGUF has several)
struct llama_expert_file {
    std::string name;
    int         fd        = -1; // buffered
    int         fd_direct = -1; // O_DIRECT, -1 if the file system refuses it
    size_t      size      = 0;
    uint64_t    device    = 0;     // st_dev
    bool        in_memory = false; // tmpfs, ramfs
};

// The descriptors stay open as long as the model, so that a file that is renamed or unlinked is still read.
struct llama_expert_files {
    // fds: open descriptors of the model's files, they are duplicated; throws std::runtime_error
    // pread: for tests; called by several threads at once
    llama_expert_files(const std::vector<int> & fds, llama_expert_io_mode mode, llama_expert_pread pread = nullptr);
    ~llama_expert_files();

    llama_expert_files(const llama_expert_files &)             = delete;
    llama_expert_files & operator=(const llama_expert_files &) = delete;

    llama_expert_io_mode mode() const { return io_mode; }

    const std::string & name(int file) const { return files[file].name; }

    size_t size(int file) const { return files[file].size; }

    uint64_t device(int file) const { return files[file].device; }
    bool     in_memory(int file) const { return files[file].in_memory; }

    // Read [offs, offs + size) so that it starts at dst + offs % LLAMA_EXPERT_IO_ALIGN. dst is aligned and has room for
    // extent(offs, size) bytes. Safe to call from several threads.
    // Returns "" or what went wrong; never fewer bytes than asked for.
    std::string read(int file, size_t offs, size_t size, uint8_t * dst) const;

    // bytes from the aligned start to the aligned end of a range
    static size_t extent(size_t offs, size_t size);

private:
    std::vector<llama_expert_file> files;

    llama_expert_io_mode io_mode;
    llama_expert_pread   pread;

    // its destructor closes what a constructor that throws has opened
    llama_expert_files(llama_expert_io_mode mode, llama_expert_pread pread);

    std::string read_at_least(int fd, bool direct, uint8_t * dst, size_t size, size_t offs, size_t need) const;
    std::string read_direct(const llama_expert_file & file, size_t offs, size_t size, uint8_t * dst) const;
    std::string read_mmap(const llama_expert_file & file, size_t offs, size_t size, uint8_t * dst) const;
};
