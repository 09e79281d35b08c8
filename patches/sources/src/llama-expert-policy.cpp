#include "llama-expert-policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

static const char * const NAMES[] = { "lru", "lfu", "next-use" };

const char * llama_expert_policy_name(llama_expert_policy policy) {
    return NAMES[policy];
}

bool llama_expert_policy_from_name(const char * name, llama_expert_policy & policy) {
    for (const auto p : { LLAMA_EXPERT_POLICY_LRU, LLAMA_EXPERT_POLICY_LFU, LLAMA_EXPERT_POLICY_NEXT_USE }) {
        if (strcmp(name, NAMES[p]) == 0) {
            policy = p;
            return true;
        }
    }
    return false;
}

class ranking_lru : public llama_expert_ranking {
public:
    explicit ranking_lru(int n_expert) : last_use(n_expert, 0) {}

    void use(const int * /*ranked*/, const int * used, int n) override {
        for (int i = 0; i < n; i++) {
            last_use[used[i]] = ++clock;
        }
    }

    bool less_valuable(int a, int b) override { return last_use[a] < last_use[b]; }

    static size_t bytes(int n_expert) { return sizeof(ranking_lru) + n_expert * sizeof(uint64_t); }

private:
    std::vector<uint64_t> last_use; // [n_expert], counts uses: experts of one token are ordered too

    uint64_t clock = 0;
};

class ranking_lfu : public ranking_lru {
public:
    explicit ranking_lfu(int n_expert) : ranking_lru(n_expert), counts(n_expert) {}

    void use(const int * ranked, const int * used, int n) override {
        ranking_lru::use(ranked, used, n);
        time++;
        for (int i = 0; i < n; i++) {
            count & c = counts[used[i]];
            c         = { time, 1.0 + decayed(c) };
        }
    }

    bool less_valuable(int a, int b) override {
        const double da = decayed(counts[a]);
        const double db = decayed(counts[b]);

        return da != db ? da < db : ranking_lru::less_valuable(a, b);
    }

    static size_t bytes(int n_expert) { return sizeof(ranking_lfu) + n_expert * (sizeof(uint64_t) + sizeof(count)); }

private:
    static constexpr double HALF_LIFE = 16.0; // tokens

    struct count {
        uint64_t time = 0; // token of the last use
        double   uses = 0; // decayed number of uses, at that token
    };

    std::vector<count> counts; // [n_expert]

    uint64_t time = 0; // tokens seen

    double decayed(const count & c) const { return c.uses * std::exp2(-(double) (time - c.time) / HALF_LIFE); }
};

class ranking_next_use : public ranking_lru {
public:
    ranking_next_use(int n_expert, int n_expert_used, int n_slots) : ranking_lru(n_expert), n_expert(n_expert) {
        weights.assign((size_t) n_rows(n_expert) * n_expert, 0.0f);
        updates.assign(n_rows(n_expert), 0.0f);
        frequency.assign(n_expert, 0.0f);
        error.resize(n_expert);
        worth.resize(n_expert);

        history.resize(horizon(n_expert_used, n_slots));
        for (auto & m : history) {
            m.ids.reserve(n_expert_used);
            m.rows.reserve(n_true(n_expert_used));
        }
        const float discount = 1.0f - (float) n_expert_used / (2 * n_slots);

        gains.assign(history.size(), 1.0f);
        for (size_t i = 1; i < gains.size(); i++) {
            gains[i] = gains[i - 1] * discount;
        }
        const float u = std::min((float) (2 * n_expert_used) / n_expert - 1.0f, 0.9f);
        const float s = u * u;

        bias = u / std::sqrt(1.0f - s);
    }

    static size_t bytes(int n_expert, int n_expert_used, int n_slots) {
        return sizeof(ranking_next_use) + n_expert * (sizeof(uint64_t) + 3 * sizeof(float)) + n_rows(n_expert) * (n_expert + 1) * sizeof(float) +
            horizon(n_expert_used, n_slots) * (sizeof(moment) + sizeof(float) + (n_expert_used + n_true(n_expert_used)) * sizeof(int));
    }

    void use(const int * ranked, const int * used, int n) override {
        ranking_lru::use(ranked, used, n);

        // this token takes the place of the oldest, whose future is known now
        moment & m = history[time % history.size()];
        m.ids.assign(ranked, ranked + n);
        if (time >= history.size()) {
            learn(m.rows);
        }
        note_context(m);

        for (int e = 0; e < n_expert; e++) {
            const float f = frequency[e] * DECAY;
            frequency[e]  = f < TINY ? 0.0f : f;
        }
        for (int i = 0; i < n; i++) {
            frequency[ranked[i]] += 1.0f;
        }
        time++;
        stale = true;
    }

    bool less_valuable(int a, int b) override {
        if (stale) {
            predict(past(0).rows, worth.data());
            for (int e = 0; e < n_expert; e++) {
                const float f = FREQUENCY * frequency[e];
                worth[e] += f;
            }
            stale = false;
        }
        return worth[a] != worth[b] ? worth[a] < worth[b] : ranking_lru::less_valuable(a, b);
    }

private:
    static constexpr int N_PAST = 3;   // tokens whose experts are context
    static constexpr int N_PAIR = 512; // rows that each kind of pair shares

    static constexpr float RATE      = 0.01f;       // of a row that was updated many times
    static constexpr float RATE_NEW  = 0.16f;       // what a row that was updated n times has on top: RATE_NEW/(n + 2)
    static constexpr float PAIR      = 9.0f;        // how much faster the row of a pair learns
    static constexpr float DECAY     = 0.91700404f; // of the frequency, per token: half in 8
    static constexpr float TINY      = 1e-6f;       // frequencies below are 0: no denormal numbers
    static constexpr float FREQUENCY = 0.12f;       // its part in the worth

    struct moment {
        std::vector<int> ids;  // experts of the token, as ranked
        std::vector<int> rows; // what was true after it
    };

    const int n_expert;

    std::vector<moment> history; // [horizon], the last tokens
    std::vector<float>  gains;   // [horizon], what is to be predicted for a use so many tokens on
    std::vector<float>  weights; // [rows][n_expert]
    std::vector<float>  updates; // [rows]
    std::vector<float>  frequency;
    std::vector<float>  error;
    std::vector<float>  worth;

    float    bias  = 0; // the z of an expert that is used by chance
    uint64_t time  = 0; // tokens seen
    bool     stale = true;

    static int n_rows(int n_expert) { return N_PAST * n_expert + 2 * N_PAIR; }
    static int n_true(int n_expert_used) { return N_PAST * n_expert_used + 2; }
    static int horizon(int n_expert_used, int n_slots) { return std::max(2, (6 * n_slots + n_expert_used) / (2 * n_expert_used)); }

    // the moment n tokens before the last one that was noted
    const moment & past(uint64_t n) const { return history[(time - 1 - n) % history.size()]; }

    static int pair_row(int a, int b) {
        uint32_t h = (uint32_t) a * 0x9e3779b1u ^ (uint32_t) b * 0x85ebca6bu;
        h ^= h >> 15;
        h *= 0x2c1b3c6du;
        h ^= h >> 13;
        return h % N_PAIR;
    }

    // m is the moment of the token that is being noted
    void note_context(moment & m) const {
        m.rows.clear();
        for (int n = 0; n < N_PAST && (uint64_t) n <= time && (size_t) n < history.size(); n++) {
            for (const int e : n == 0 ? m.ids : past(n - 1).ids) {
                m.rows.push_back(n * n_expert + e);
            }
        }
        const int pairs = N_PAST * n_expert;
        if (m.ids.size() > 1) {
            m.rows.push_back(pairs + pair_row(std::min(m.ids[0], m.ids[1]), std::max(m.ids[0], m.ids[1])));
        }
        if (time > 0) {
            m.rows.push_back(pairs + N_PAIR + pair_row(m.ids[0], past(0).ids[0]));
        }
    }

    void predict(const std::vector<int> & rows, float * z) const {
        std::fill(z, z + n_expert, bias);
        for (const int row : rows) {
            const float * w = weights.data() + (size_t) row * n_expert;
            for (int e = 0; e < n_expert; e++) {
                z[e] += w[e];
            }
        }
    }

    // rows: what was true a horizon ago; history holds all tokens since
    void learn(const std::vector<int> & rows) {
        // the nearest use of an expert is written last
        std::fill(error.begin(), error.end(), 0.0f);
        for (size_t i = history.size(); i-- > 0;) {
            for (const int e : history[(time + 1 + i) % history.size()].ids) {
                error[e] = gains[i];
            }
        }

        predict(rows, worth.data());
        for (int e = 0; e < n_expert; e++) {
            const float z = worth[e];
            const float s = z * z;
            const float p = z / std::sqrt(1.0f + s) * 0.5f;
            error[e] -= p + 0.5f;
        }
        for (const int row : rows) {
            float rate = RATE + RATE_NEW / (updates[row] + 2.0f);
            if (row >= N_PAST * n_expert) {
                rate *= PAIR;
            }
            updates[row] += 1.0f;

            float * w = weights.data() + (size_t) row * n_expert;
            for (int e = 0; e < n_expert; e++) {
                const float d = rate * error[e];
                w[e] += d;
            }
        }
    }
};

std::unique_ptr<llama_expert_ranking> llama_expert_ranking::make(llama_expert_policy policy, int n_expert, int n_expert_used, int n_slots) {
    switch (policy) {
        case LLAMA_EXPERT_POLICY_LRU:
            return std::make_unique<ranking_lru>(n_expert);
        case LLAMA_EXPERT_POLICY_LFU:
            return std::make_unique<ranking_lfu>(n_expert);
        case LLAMA_EXPERT_POLICY_NEXT_USE:
            return std::make_unique<ranking_next_use>(n_expert, n_expert_used, n_slots);
    }
    return nullptr;
}

size_t llama_expert_ranking::bytes(llama_expert_policy policy, int n_expert, int n_expert_used, int n_slots) {
    switch (policy) {
        case LLAMA_EXPERT_POLICY_LRU:
            return ranking_lru::bytes(n_expert);
        case LLAMA_EXPERT_POLICY_LFU:
            return ranking_lfu::bytes(n_expert);
        case LLAMA_EXPERT_POLICY_NEXT_USE:
            return ranking_next_use::bytes(n_expert, n_expert_used, n_slots);
    }
    return 0;
}
