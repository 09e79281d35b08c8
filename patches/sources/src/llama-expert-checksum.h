#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct llama_expert_files;
struct llama_expert_group_desc;

// Checksums of expert slices: wrong bytes of a read are found before they are used.
//
// They are taken from the file itself, in one sweep over all experts when the slots are allocated. Bytes that pass are
// those of that sweep: a cable, a controller or a page that lies later is found, and so is a file that was overwritten.
// A file that was wrong before is not.

// XXH64 with seed 0 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md)
uint64_t llama_expert_checksum(const void * data, size_t size);

class llama_expert_checksums {
public:
    // the fraction of the bytes that has been read
    typedef std::function<void(double done)> progress;

    // groups: their tensors lie within the files
    explicit llama_expert_checksums(const std::vector<llama_expert_group_desc> & groups);

    // bytes of the table
    size_t bytes() const;

    // Read every expert once, with so many threads and a buffer of one expert for each; throws std::runtime_error if one
    // cannot be read. report may be empty, one thread calls it.
    void sweep(const llama_expert_files & files, const std::vector<llama_expert_group_desc> & groups, int n_threads, const progress & report);

    uint64_t at(int group, int tensor, int expert) const { return sums[group][tensor][expert]; }

private:
    std::vector<std::vector<std::vector<uint64_t>>> sums; // [group][tensor][expert]
};
