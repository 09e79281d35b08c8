#pragma once

#include "llama.h"

#include <string>
#include <vector>

// The expert cache is configured through the metadata overrides of a model (see llama-expert.h). These are the command
// line's side of it, shared by common_params and llama-bench.

// set expert_cache.<key>, in place of a value that is there already (the environment is read before the arguments)
void common_expert_cache_set(std::vector<llama_model_kv_override> & overrides, const std::string & key, const std::string & value);
void common_expert_cache_set(std::vector<llama_model_kv_override> & overrides, const std::string & key, int64_t value);
void common_expert_cache_set(std::vector<llama_model_kv_override> & overrides, const std::string & key, double value);

// expert_cache.threads, "auto" or a number; throws std::invalid_argument
void common_expert_cache_set_threads(std::vector<llama_model_kv_override> & overrides, const std::string & value);

// the environment variables LLAMA_ARG_EXPERT_CACHE*, for tools without common_arg; none of them sets a route bias
void common_expert_cache_from_env(std::vector<llama_model_kv_override> & overrides);

// throws std::invalid_argument if there are expert_cache.* keys and no budget: they would have no effect
void common_expert_cache_check(const std::vector<llama_model_kv_override> & overrides);

// remove all expert_cache.* keys: a draft model does not inherit the cache of its main model
void common_expert_cache_remove(std::vector<llama_model_kv_override> & overrides);
