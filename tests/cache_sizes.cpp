// Sizes of the objects that the expert cache counts into its budget, for tests/test_plan.py.

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define private public
#include "llama-expert-cache.h"

#include <cstdio>

int main() {
    using cache = llama_expert_cache;
    printf("%zu %zu %zu %zu %zu\n", sizeof(cache), sizeof(cache::group), sizeof(cache::tensor), sizeof(cache::slice), sizeof(cache::request));
}
