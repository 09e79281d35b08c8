#pragma once

#include <cstdint>
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

// Is a layer's forecast good enough to be read ahead? Judged by how its forecasts turned out: of the experts that were
// forecast and were in no slot, the share that the layer then used, as an exponential mean.
//
// While it is not good enough, one forecast in EVERY is made, to be judged and not to be read. A read that is not needed
// delays those that are by at most the part of it that is under way, and takes the slot of the expert that is worth
// least; one that is needed saves what fits into the time in which storage is idle. Where the two are equal, and what
// was measured: docs/performance.md.
struct llama_expert_judge {
    static constexpr int   EVERY   = 8;
    static constexpr int   N_LEAST = 24;    // experts, before there is a judgement
    static constexpr float RATE    = 1.0f / 64;
    static constexpr float STARTS  = 0.60f; // precision from which it is read ahead
    static constexpr float STOPS   = 0.55f; // precision below which it is not any more

    float   precision = 0.0f;
    int32_t n_judged  = 0; // experts, no more are counted than RATE needs
    int32_t n_skipped = 0; // calls without a forecast
    bool    pays      = false;

    // whether a forecast should be made for the call that comes
    bool wants();

    // n experts were forecast, the call used n_used of them
    void score(int n, int n_used);
};
