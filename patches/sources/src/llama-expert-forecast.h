#pragma once

#include <vector>

// Which experts will the next layer choose? Its router is applied to this layer's input: one block changes the residual
// stream little, so most of the choice is the same. Knows no model: it is given the weights.

// a router as it lies in memory, row-major
struct llama_expert_router {
    int n_embd        = 0;
    int n_expert      = 0;
    int n_expert_used = 0;

    const float * weight = nullptr; // [n_expert][n_embd], nullptr: this layer has no router that can be used
    const float * bias   = nullptr; // [n_expert] of the logits, or nullptr
    const float * choice = nullptr; // [n_expert] added to the probabilities for the choice only, or nullptr
    const float * norm   = nullptr; // [n_embd] weights of the norm in front of it, or nullptr

    bool sigmoid = false; // probabilities are sigmoids of the logits, not their softmax
};

// x: [n_tokens] inputs of router cur, each n_embd floats, stride floats apart.
// Returns the distinct experts that router next would choose, the first choices of all tokens first.
std::vector<int> llama_expert_forecast(
    const llama_expert_router & cur,
    const llama_expert_router & next,
    const float *               x,
    int                         n_tokens,
    int                         stride);
