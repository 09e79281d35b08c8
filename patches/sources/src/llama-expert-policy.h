#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// Which expert of a layer loses its slot. A policy hears of every token that the layer computes and orders the experts
// by what they are worth; the cache never evicts an expert of the current call, whatever the policy says.
//
//   LRU       worth is the last use.
//   LFU       worth is the number of uses, halved every 16 tokens; of equals, the last use.
//   NEXT_USE  worth is how soon an expert is expected back, with what the last tokens chose as the context; of equals,
//             the last use. The expectation is learned while the layer runs and starts from nothing:
//
//             A row of n_expert weights belongs to each thing that can be true of the context: expert i was used by this
//             token, by the one before, by the one before that; the two experts that the router ranked first were i and
//             j; the first of this token and of the one before were i and j (pairs share rows by hash). The rows of what
//             is true, summed, give z[e] and with it p[e] = 1/2 + z/(2*sqrt(1 + z*z)), which is to predict d^(n - 1) for
//             an expert that is used next n tokens later, 0 if that is beyond the horizon. The horizon is three times
//             and 1/(1 - d) twice the tokens whose experts fill the slots: what a slot can outlive. What came of a context
//             is known when the horizon has passed: then each of its rows moves by rate*(what came - p), at a rate that
//             falls with its updates. That is an online regression to the quantity by which Belady's rule evicts. Worth
//             is z plus a little of the decayed frequency, which carries the first tokens.
//
// remoe_edge/routing/policies.py does the same operations on the same types in the same order, so that the simulator
// evicts what the runtime evicts, to the bit: only + - * / and sqrt of IEEE 754 floats, never contracted into one
// instruction (-ffp-contract=off, see CMakeLists.txt). tests/test-expert-policy.cpp and tests/test_policies.py hold both
// against the same recorded victims.

enum llama_expert_policy {
    LLAMA_EXPERT_POLICY_LRU,
    LLAMA_EXPERT_POLICY_LFU,
    LLAMA_EXPERT_POLICY_NEXT_USE,
};

const char * llama_expert_policy_name(llama_expert_policy policy);

// false if there is no policy of this name
bool llama_expert_policy_from_name(const char * name, llama_expert_policy & policy);

// the policy of one layer
class llama_expert_ranking {
public:
    static std::unique_ptr<llama_expert_ranking> make(llama_expert_policy policy, int n_expert, int n_expert_used, int n_slots);

    // memory it takes
    static size_t bytes(llama_expert_policy policy, int n_expert, int n_expert_used, int n_slots);

    virtual ~llama_expert_ranking() = default;

    // A token uses n experts, given twice: as the router ranked them, and in the order of use, which is that of the
    // router with those that are in a slot before the others.
    virtual void use(const int * ranked, const int * used, int n) = 0;

    // whether a should leave before b
    virtual bool less_valuable(int a, int b) = 0;
};
