#pragma once

#include "ggml-cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// the source of a tensor in an expert buffer, NULL for all other tensors
const struct ggml_cpu_expert_source * ggml_cpu_expert_source_of(const struct ggml_tensor * tensor);

#ifdef __cplusplus
}
#endif
