// The event loop of simulate.py around the runtime's own policies: compiled at the first simulation together with
// patches/sources/src/llama-expert-policy.cpp, see native.py. The Python policies are the reference that tests hold it to.

#include "llama-expert-policy.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr uint16_t NOT_COMPUTED = 65535;

// the policies of the runtime, and the one that looks into the future
class choice {
public:
    virtual ~choice() = default;

    virtual void use(int64_t token, const int * ranked, const int * used, int n) = 0;
    virtual bool less_valuable(int a, int b)                                     = 0;
};

class runtime_policy : public choice {
public:
    runtime_policy(llama_expert_policy policy, int n_expert, int n_used, int n_slots) : ranking(llama_expert_ranking::make(policy, n_expert, n_used, n_slots)) {}

    void use(int64_t /*token*/, const int * ranked, const int * used, int n) override { ranking->use(ranked, used, n); }
    bool less_valuable(int a, int b) override { return ranking->less_valuable(a, b); }

private:
    std::unique_ptr<llama_expert_ranking> ranking;
};

class belady : public choice {
public:
    // begin, end: the tokens that it knows of
    belady(const uint16_t * ids, int64_t begin, int64_t end, int n_expert, int n_used) : ids(ids), first(begin), n_used(n_used), next(n_expert, NEVER), next_of((end - begin) * n_used) {
        for (int64_t token = end; token-- > begin;) {
            const uint16_t * event = ids + token * n_used;
            if (event[0] == NOT_COMPUTED) {
                continue;
            }
            for (int i = 0; i < n_used; i++) {
                next_of[(token - begin) * n_used + i] = next[event[i]];
                next[event[i]]                        = token;
            }
        }
    }

    void use(int64_t token, const int * ranked, const int * /*used*/, int n) override {
        for (int i = 0; i < n; i++) {
            next[ranked[i]] = next_of[(token - first) * n_used + i];
        }
    }

    bool less_valuable(int a, int b) override { return next[a] != next[b] ? next[a] > next[b] : a < b; }

private:
    static constexpr int64_t NEVER = INT64_MAX;

    const uint16_t * ids;
    const int64_t    first;
    const int        n_used;

    std::vector<int64_t> next;    // [n_expert] token of the next use
    std::vector<int64_t> next_of; // [tokens][n_used] token of the use after this one
};

} // namespace

// One layer of a trace.
//
//   ids       [offs[n_sequences]][n_used], the experts of a token as ranked; NOT_COMPUTED where the layer has no event
//   offs      [n_sequences + 1], tokens at which sequences begin
//   cold      cache and policy start anew with every sequence
//   counters  [n_sequences][3]: hits, misses, evictions
//   victims   in their order, nullptr or room for every use of an expert
//
// n_slots is at least n_used. Returns 0, 1 for an unknown policy, 2 if memory is short.
extern "C" int remoe_simulate_layer(const char * name, int n_expert, int n_used, int n_slots, const uint16_t * ids, const int64_t * offs, int64_t n_sequences, int cold, uint64_t * counters, uint16_t * victims) try {
    llama_expert_policy policy  = LLAMA_EXPERT_POLICY_LRU;
    const bool          forever = strcmp(name, "belady") == 0;
    if (!forever && !llama_expert_policy_from_name(name, policy)) {
        return 1;
    }
    std::unique_ptr<choice> chosen;
    std::vector<int>        slot_of(n_expert, -1); // -1: not in a slot
    std::vector<int>        expert_of;             // [slots in use]
    std::vector<int64_t>    last(n_expert, -1);    // token of the last use
    std::vector<int>        ranked(n_used);
    std::vector<int>        used(n_used);
    expert_of.reserve(n_slots);

    for (int64_t is = 0; is < n_sequences; is++) {
        if (is == 0 || cold) {
            if (forever) {
                chosen = std::make_unique<belady>(ids, offs[is], offs[cold ? is + 1 : n_sequences], n_expert, n_used);
            } else {
                chosen = std::make_unique<runtime_policy>(policy, n_expert, n_used, n_slots);
            }
            for (const int expert : expert_of) {
                slot_of[expert] = -1;
            }
            expert_of.clear();
        }
        uint64_t hits      = 0;
        uint64_t misses    = 0;
        uint64_t evictions = 0;
        for (int64_t token = offs[is]; token < offs[is + 1]; token++) {
            const uint16_t * event = ids + token * n_used;
            if (event[0] == NOT_COMPUTED) {
                continue;
            }
            int n_hits = 0;
            for (int i = 0; i < n_used; i++) {
                ranked[i] = event[i];
                last[event[i]] = token;
                if (slot_of[event[i]] != -1) {
                    used[n_hits++] = event[i];
                }
            }
            for (int i = 0, n = n_hits; n < n_used; i++) {
                if (slot_of[event[i]] == -1) {
                    used[n++] = event[i];
                }
            }
            chosen->use(token, ranked.data(), used.data(), n_used);

            for (int i = n_hits; i < n_used; i++) {
                int slot = expert_of.size();
                if (slot < n_slots) {
                    expert_of.push_back(-1);
                } else {
                    slot = -1;
                    for (int other = 0; other < n_slots; other++) {
                        if (last[expert_of[other]] != token && (slot == -1 || chosen->less_valuable(expert_of[other], expert_of[slot]))) {
                            slot = other;
                        }
                    }
                    slot_of[expert_of[slot]] = -1;
                    if (victims != nullptr) {
                        *victims++ = expert_of[slot];
                    }
                    evictions++;
                }
                expert_of[slot]  = used[i];
                slot_of[used[i]] = slot;
            }
            hits += n_hits;
            misses += n_used - n_hits;
        }
        counters[3 * is + 0] = hits;
        counters[3 * is + 1] = misses;
        counters[3 * is + 2] = evictions;
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 2;
}
