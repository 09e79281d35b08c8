#pragma once

#include <cstdint>
#include <string>
#include <vector>

// The hot set of a run: which experts had slots when the model was freed. The next run loads them before anything asks
// for them. It is a hint, whatever the file says: output never depends on it. A text file, so that it can be looked at:
//
//   remoe-edge hot set 1
//   model 8f1c0de2a0b4c6d7     of the model's expert tensors and routers
//   layers 2                   MoE layers (expert groups)
//   3 14 1 5                   experts of each layer, the most valuable first
//   2 7 8
//   end
//
// Files are not trusted: another version, another model, an expert that does not exist or is named twice, a missing
// end, and the file is not used.

struct llama_expert_hot_set {
    uint64_t                      model = 0;
    std::vector<std::vector<int>> experts; // [groups]
};

// n_experts: [groups] of the model. Returns "" or why path cannot be used; missing: there is no such file (not an error,
// it will be written)
std::string llama_expert_hot_set_read(const std::string & path, uint64_t model, const std::vector<int> & n_experts, llama_expert_hot_set & res, bool & missing);

// Whole or not at all. Returns "" or what went wrong. A file that is there and is no hot set stays as it is.
std::string llama_expert_hot_set_write(const std::string & path, const llama_expert_hot_set & hot);

// "" or why a file could not be written there
std::string llama_expert_hot_set_writable(const std::string & path);

// FNV-1a over some bytes, from an earlier value or LLAMA_EXPERT_HASH_START
static constexpr uint64_t LLAMA_EXPERT_HASH_START = 0xcbf29ce484222325ull;

uint64_t llama_expert_hash(uint64_t hash, const void * data, size_t size);
