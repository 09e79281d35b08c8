#include "llama-expert-bias.h"

#include <algorithm>
#include <cmath>
#include <numeric>

std::vector<int> llama_expert_bias::rank(const float * z, const std::vector<bool> & resident, double lambda, int n_keep) {
    const int n = resident.size();
    if (n == 0 || !std::all_of(z, z + n, [](float x) { return std::isfinite(x); })) {
        return {};
    }
    const auto [lo, hi] = std::minmax_element(z, z + n);

    n_tokens++;
    mean += ((double) *hi - *lo - mean) / n_tokens;

    std::vector<int> res(n);
    std::iota(res.begin(), res.end(), 0);
    std::stable_sort(res.begin(), res.end(), [&](int a, int b) { return z[a] > z[b]; });

    // equal scores stay in the router's order
    const auto biased = [&](int e) { return z[e] + (resident[e] ? lambda * mean : 0.0); };
    std::stable_sort(res.begin() + std::min(n_keep, n), res.end(), [&](int a, int b) { return biased(a) > biased(b); });

    return res;
}
