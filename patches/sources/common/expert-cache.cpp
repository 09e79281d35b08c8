#include "expert-cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

static const std::string PREFIX = "expert_cache.";

static llama_model_kv_override & find_or_add(std::vector<llama_model_kv_override> & overrides, const std::string & key) {
    const std::string name = PREFIX + key;
    for (auto & kv : overrides) {
        if (name == kv.key) {
            return kv;
        }
    }
    llama_model_kv_override kv = {};
    strncpy(kv.key, name.c_str(), sizeof(kv.key) - 1);
    overrides.push_back(kv);

    return overrides.back();
}

void common_expert_cache_set(std::vector<llama_model_kv_override> & overrides, const std::string & key, const std::string & value) {
    auto & kv = find_or_add(overrides, key);
    if (value.size() >= sizeof(kv.val_str)) {
        throw std::invalid_argument("the value of an --expert-cache option is longer than 127 bytes: " + value + "\n");
    }
    kv.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    memset(kv.val_str, 0, sizeof(kv.val_str));
    strncpy(kv.val_str, value.c_str(), sizeof(kv.val_str) - 1);
}

void common_expert_cache_set(std::vector<llama_model_kv_override> & overrides, const std::string & key, int64_t value) {
    auto & kv  = find_or_add(overrides, key);
    kv.tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
    kv.val_i64 = value;
}

void common_expert_cache_set(std::vector<llama_model_kv_override> & overrides, const std::string & key, double value) {
    auto & kv  = find_or_add(overrides, key);
    kv.tag     = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
    kv.val_f64 = value;
}

void common_expert_cache_set_threads(std::vector<llama_model_kv_override> & overrides, const std::string & value) {
    if (value == "auto") {
        common_expert_cache_set(overrides, "threads", value);
        return;
    }
    size_t  pos = 0;
    int64_t n   = 0;
    try {
        n = std::stoll(value, &pos);
    } catch (const std::exception &) {
        pos = std::string::npos;
    }
    if (pos != value.size()) {
        throw std::invalid_argument("--expert-cache-threads is a number or auto, not '" + value + "'\n");
    }
    common_expert_cache_set(overrides, "threads", n);
}

void common_expert_cache_from_env(std::vector<llama_model_kv_override> & overrides) {
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE")) {
        common_expert_cache_set(overrides, "budget", value);
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE_POLICY")) {
        common_expert_cache_set(overrides, "policy", value);
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE_IO")) {
        common_expert_cache_set(overrides, "io", value);
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE_REPACK")) {
        common_expert_cache_set(overrides, "repack", value);
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE_WARM")) {
        common_expert_cache_set(overrides, "warm", value);
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_PREFETCH")) {
        common_expert_cache_set(overrides, "prefetch", value);
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE_VERIFY")) {
        // what common_arg takes for a flag that is set
        const std::string text = value;
        if (text == "1" || text == "on" || text == "true" || text == "enabled") {
            common_expert_cache_set(overrides, "verify", "on");
        }
    }
    if (const char * value = std::getenv("LLAMA_ARG_EXPERT_CACHE_THREADS")) {
        common_expert_cache_set_threads(overrides, value);
    }
}

static bool is_mine(const llama_model_kv_override & kv) {
    return strncmp(kv.key, PREFIX.c_str(), PREFIX.size()) == 0;
}

void common_expert_cache_check(const std::vector<llama_model_kv_override> & overrides) {
    const bool any    = std::any_of(overrides.begin(), overrides.end(), is_mine);
    const bool budget = std::any_of(overrides.begin(), overrides.end(), [](const auto & kv) { return PREFIX + "budget" == kv.key; });
    if (any && !budget) {
        throw std::invalid_argument("error: --expert-cache-policy, -io, -threads, -repack, -verify, -warm, --expert-prefetch, --expert-route-bias and -keep have no effect without --expert-cache\n");
    }
}

void common_expert_cache_remove(std::vector<llama_model_kv_override> & overrides) {
    overrides.erase(std::remove_if(overrides.begin(), overrides.end(), is_mine), overrides.end());
}
