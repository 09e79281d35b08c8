#pragma once

#include "common.cuh"

class ggml_cuda_expert_calls;
struct ggml_cuda_experts_i;

// functions of ggml-cuda.cu
struct ggml_cuda_expert_hooks {
    ggml_status (*graph_compute)(ggml_backend_t backend, ggml_cgraph * cgraph);
    bool (*needs_sync)(const ggml_tensor * dst, int cc);

    // experts != nullptr: one matrix product for every expert that it returns, at the address that it returns
    void (*mul_mat_id)(ggml_backend_cuda_context & ctx, ggml_tensor * dst, ggml_cuda_expert_calls * experts);
};

bool ggml_backend_buft_is_cuda_experts(ggml_backend_buffer_type_t buft);

// the first node from i on that needs experts of a source, n_nodes if there is none
int ggml_cuda_experts_find(const ggml_cgraph * cgraph, int i);

// Compute a graph with such nodes: the host has a part in them, so what lies between two of them is a graph of its own,
// which may be captured as any other.
ggml_status ggml_cuda_experts_graph_compute(ggml_backend_t backend, ggml_cgraph * cgraph, const ggml_cuda_expert_hooks & hooks);

const ggml_cuda_experts_i * ggml_backend_cuda_experts(void);
