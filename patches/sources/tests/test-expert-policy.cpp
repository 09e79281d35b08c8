// Unit test of the policies against victims that the simulator recorded: test-expert-policy FILE
//
// FILE has blocks of lines, one for each policy and number of slots, made by tests/test_policy_vectors.py:
//   policy NAME EXPERTS K SLOTS
//   EXPERT... [: VICTIM...]    a token's experts as ranked by the router, and who was evicted for it, in that order

#include "../src/llama-expert-policy.h"

#undef NDEBUG
#include <algorithm>
#include <cassert>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

struct layer {
    std::unique_ptr<llama_expert_ranking> ranking;

    size_t           n_slots = 0;
    std::vector<int> resident;

    bool holds(int e) const { return std::find(resident.begin(), resident.end(), e) != resident.end(); }

    std::vector<int> token(const std::vector<int> & ranked) {
        std::vector<int> used, missing, victims;
        for (const int e : ranked) {
            (holds(e) ? used : missing).push_back(e);
        }
        used.insert(used.end(), missing.begin(), missing.end());
        ranking->use(ranked.data(), used.data(), ranked.size());

        for (const int e : missing) {
            if (resident.size() == n_slots) {
                int victim = -1;
                for (const int r : resident) {
                    const bool needed = std::find(ranked.begin(), ranked.end(), r) != ranked.end();
                    if (!needed && (victim == -1 || ranking->less_valuable(r, victim))) {
                        victim = r;
                    }
                }
                assert(victim != -1);
                resident.erase(std::find(resident.begin(), resident.end(), victim));
                victims.push_back(victim);
            }
            resident.push_back(e);
        }
        return victims;
    }
};

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s FILE\n", argv[0]);
        return 2;
    }
    std::ifstream in(argv[1]);
    std::string   line;
    layer         cur;
    int           n_blocks = 0, n_victims = 0, n_line = 0;
    while (std::getline(in, line)) {
        std::istringstream words(line);
        n_line++;
        if (line.rfind("policy ", 0) == 0) {
            std::string word, name;
            int         n_expert, k;
            words >> word >> name >> n_expert >> k >> cur.n_slots;
            assert(words);

            llama_expert_policy policy;
            assert(llama_expert_policy_from_name(name.c_str(), policy));
            cur.ranking = llama_expert_ranking::make(policy, n_expert, k, cur.n_slots);
            cur.resident.clear();
            n_blocks++;
            continue;
        }
        std::vector<int> ranked, victims;
        std::string      word;
        bool             after = false;
        while (words >> word) {
            if (word == ":") {
                after = true;
            } else {
                (after ? victims : ranked).push_back(std::stoi(word));
            }
        }
        if (cur.token(ranked) != victims) {
            fprintf(stderr, "%s:%d: other victims\n", argv[1], n_line);
            return 1;
        }
        n_victims += victims.size();
    }
    assert(n_blocks > 0 && n_victims > 0);
    printf("OK: %d victims of %d policies and sizes\n", n_victims, n_blocks);

    return 0;
}
