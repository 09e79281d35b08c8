#pragma once

#include "llama-expert-cache.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// How many reader threads does the storage of a model want? Random expert slices are read with 1, 2, 4, 8 and 16 threads
// for a moment each, in the read mode in use; the smallest number within 5 % of the best is taken. What was found is
// remembered for the device, in a text file, so that it can be looked at and removed:
//
//   remoe-edge readers 1
//   66306 direct 2097152 4 2870     st_dev, read mode, slices up to this many bytes, threads, MB/s with them
//   end
//
// The file is not trusted: another version, anything out of bounds, a missing end, and it is written anew. A wrong entry
// costs speed, nothing else.

struct llama_expert_readers {
    uint64_t    device = 0;
    std::string io;        // "direct", "mmap"
    uint64_t    size     = 0; // of slices: a power of two
    int         n        = 0; // threads
    int         mb_per_s = 0;
};

// where such a file is: in $REMOE_EDGE_CACHE, else remoe-edge in $XDG_CACHE_HOME, else in ~/.cache; "" if there is no such folder
std::string llama_expert_readers_path();

std::vector<llama_expert_readers> llama_expert_readers_read(const std::string & path);

// with its folder, if that is not there; returns "" or what went wrong
std::string llama_expert_readers_write(const std::string & path, const std::vector<llama_expert_readers> & entries);

// rates: (threads, bytes per second), by threads; 0 if there are none
int llama_expert_readers_choose(const std::vector<std::pair<int, double>> & rates);

// n_room: bytes that buffers may take. Buffers are gone when this returns. A read that fails ends it: the cache reads
// the same and will say so.
std::vector<std::pair<int, double>> llama_expert_readers_measure(const llama_expert_files & files, const std::vector<llama_expert_group_desc> & groups, size_t n_room);
