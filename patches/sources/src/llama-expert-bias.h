#pragma once

#include <cstdint>
#include <vector>

// What one router ranks first if experts in the cache are preferred (cache-prior, arXiv 2412.00099):
//
//   z[e] + lambda * D    if e is in the cache, else z[e]
//
// z are the scores that the router ranks by, D is the mean of max(z) - min(z) over the tokens of the layer so far, this
// one included. The first n_keep of the router's own ranking stay first. Weights are none of its business: they come from
// the unmodified scores. Knows no model. Lossy: other experts than the model's are chosen.
class llama_expert_bias {
public:
    // z, resident: [n_expert]; returns the experts from first to last, none if a score is not finite
    std::vector<int> rank(const float * z, const std::vector<bool> & resident, double lambda, int n_keep);

    double range() const { return mean; }

private:
    uint64_t n_tokens = 0;
    double   mean     = 0.0;
};
