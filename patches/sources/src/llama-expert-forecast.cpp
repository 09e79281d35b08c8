#include "llama-expert-forecast.h"

#include <algorithm>
#include <cmath>
#include <numeric>

bool llama_expert_judge::wants() {
    if (pays || n_judged < N_LEAST || ++n_skipped >= EVERY) {
        n_skipped = 0;
        return true;
    }
    return false;
}

void llama_expert_judge::score(int n, int n_used) {
    // one by one, those that were used evenly among the others
    for (int i = 0; i < n; i++) {
        const bool used = (i + 1) * n_used / n > i * n_used / n;

        n_judged = std::min(n_judged + 1, (int32_t) (1 / RATE));
        precision += (used - precision) * std::max(RATE, 1.0f / n_judged);
    }
    if (n_judged >= N_LEAST) {
        pays = precision >= (pays ? STOPS : STARTS);
    }
}

static float dot(const float * a, const float * b, int n) {
    constexpr int N_SUMS = 16; // independent sums, so that the compiler may use vectors

    float sums[N_SUMS] = {};
    int   i            = 0;
    for (; i + N_SUMS <= n; i += N_SUMS) {
        for (int j = 0; j < N_SUMS; j++) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    float res = std::accumulate(sums, sums + N_SUMS, 0.0f);
    for (; i < n; i++) {
        res += a[i] * b[i];
    }
    return res;
}

std::vector<int> llama_expert_forecast(
    const llama_expert_router & cur,
    const llama_expert_router & next,
    const float *               x,
    int                         n_tokens,
    int                         stride) {
    std::vector<float> input(next.n_embd);
    std::vector<float> value(next.n_expert);
    std::vector<int>   best(next.n_expert);

    std::vector<std::vector<int>> choices;
    for (int it = 0; it < n_tokens; it++) {
        // as the norm of the next layer would have weighted it
        for (int i = 0; i < next.n_embd; i++) {
            const float scale = cur.norm && next.norm && cur.norm[i] != 0.0f ? next.norm[i] / cur.norm[i] : 1.0f;
            input[i]          = x[it * stride + i] * scale;
        }
        for (int e = 0; e < next.n_expert; e++) {
            value[e] = dot(next.weight + (size_t) e * next.n_embd, input.data(), next.n_embd) + (next.bias ? next.bias[e] : 0.0f);
        }
        if (next.choice) {
            const float max = *std::max_element(value.begin(), value.end());
            float       sum = 0.0f;
            for (float & v : value) {
                v = next.sigmoid ? 1.0f / (1.0f + std::exp(-v)) : std::exp(v - max);
                sum += v;
            }
            for (int e = 0; e < next.n_expert; e++) {
                value[e] = (next.sigmoid ? value[e] : value[e] / sum) + next.choice[e];
            }
        }
        std::iota(best.begin(), best.end(), 0);
        const int n = std::min(next.n_expert_used, next.n_expert);
        std::partial_sort(best.begin(), best.begin() + n, best.end(), [&](int a, int b) { return value[a] > value[b]; });
        choices.emplace_back(best.begin(), best.begin() + n);
    }

    std::vector<int>  res;
    std::vector<bool> seen(next.n_expert, false);
    for (int k = 0; k < next.n_expert_used; k++) {
        for (const auto & choice : choices) {
            if (k < (int) choice.size() && !seen[choice[k]]) {
                seen[choice[k]] = true;
                res.push_back(choice[k]);
            }
        }
    }
    return res;
}
