#include "llama-expert-trace.h"

#include "llama-expert.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-experts.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifndef _WIN32
#include <unistd.h>
#endif

//
// .npz: a zip archive without compression, of .npy arrays
//

static uint32_t crc32_update(uint32_t crc, const void * data, size_t size) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> res;
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) {
                c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            }
            res[i] = c;
        }
        return res;
    }();
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc = table[(crc ^ ((const uint8_t *) data)[i]) & 0xff] ^ (crc >> 8);
    }
    return ~crc;
}

static void put(std::string & out, uint64_t value, int n_bytes) {
    for (int i = 0; i < n_bytes; i++) {
        out += (char) (value >> 8 * i);
    }
}

static constexpr size_t NPY_HEADER = 128;

// version 1.0 header, always NPY_HEADER bytes, so that it can be written last
static std::string npy_header(const std::string & descr, const std::string & shape) {
    std::string dict = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (" + shape + "), }";
    dict.resize(NPY_HEADER - 10 - 1, ' ');
    dict += '\n';

    std::string res = "\x93NUMPY";
    put(res, 1, 1);
    put(res, 0, 1);
    put(res, dict.size(), 2);

    return res + dict;
}

struct zip_entry {
    std::string name;
    uint64_t    offs = 0; // of the local header
    uint64_t    size = 0;
    uint32_t    crc  = 0;
};

// the fields that the local header and the central directory share
static std::string zip_common(const zip_entry & e) {
    std::string res;
    put(res, 20, 2);         // version needed
    put(res, 0, 2);          // flags
    put(res, 0, 2);          // stored
    put(res, 0, 2);          // time, fixed: the same run gives the same file
    put(res, 0x0021, 2);     // date 1980-01-01
    put(res, e.crc, 4);
    put(res, e.size, 4);
    put(res, e.size, 4);
    put(res, e.name.size(), 2);
    put(res, 0, 2);          // extra
    return res;
}

static std::string zip_local(const zip_entry & e) {
    std::string res;
    put(res, 0x04034b50, 4);
    return res + zip_common(e) + e.name;
}

static const zip_entry ENTRY_IDS = { "ids.npy", 0, 0, 0 };

static size_t ids_data_start() {
    return zip_local(ENTRY_IDS).size() + NPY_HEADER;
}

//
// llama_expert_trace
//

llama_expert_trace::llama_expert_trace(
    const std::string &              path,
    const std::string &              model,
    const std::string &              meta_more,
    int                              n_expert,
    bool                             with_probs,
    ggml_backend_sched_eval_callback cb_next,
    void *                           cb_next_user_data) : cb_next(cb_next), cb_next_user_data(cb_next_user_data), path(path), model(model), meta_more(meta_more), n_expert(n_expert) {
#ifndef _WIN32
    path_tmp = path + ".tmp-" + std::to_string(getpid());
#else
    path_tmp = path + ".tmp";
#endif
    path_tmp_probs = path_tmp + "-probs";

    file = fopen(path_tmp.c_str(), "w+b");
    if (file && with_probs) {
        file_probs = fopen(path_tmp_probs.c_str(), "w+b");
    }
    if (!file || (with_probs && !file_probs)) {
        const std::string reason = strerror(errno);
        discard();
        throw std::runtime_error("cannot write the expert trace " + path_tmp + ": " + reason);
    }
    const std::string blank(ids_data_start(), '\0');
    if (fwrite(blank.data(), 1, blank.size(), file) != blank.size()) {
        fail(strerror(errno));
    }
}

llama_expert_trace::~llama_expert_trace() {
    discard();
}

void llama_expert_trace::discard() {
    if (file) {
        fclose(file);
        remove(path_tmp.c_str());
        file = nullptr;
    }
    if (file_probs) {
        fclose(file_probs);
        remove(path_tmp_probs.c_str());
        file_probs = nullptr;
    }
}

void llama_expert_trace::fail(const std::string & text) {
    if (err.empty()) {
        err = "expert trace " + path + ": " + text;
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.c_str());
    }
}

bool llama_expert_trace::eval_callback(ggml_tensor * t, bool ask, void * user_data) {
    auto * self = (llama_expert_trace *) user_data;

    int il = -1;

    const bool is_ids = sscanf(t->name, "ffn_moe_topk-%d", &il) == 1;
    // where the router's values are logits, their softmax over the chosen experts comes later and takes their place
    const bool is_softmax = !is_ids && self->file_probs && sscanf(t->name, "ffn_moe_weights_softmax-%d", &il) == 1;
    const bool is_probs   = is_softmax || (!is_ids && self->file_probs && sscanf(t->name, "ffn_moe_weights-%d", &il) == 1);

    if (ask) {
        return is_ids || is_probs || (self->cb_next && self->cb_next(t, true, self->cb_next_user_data));
    }
    if (is_ids && self->chosen.count(il) == 0) {
        self->take_ids(il, t);
    }
    if (is_probs && (is_softmax || self->probs.count(il) == 0)) {
        self->take_probs(il, t);
    }
    if (self->cb_next && self->cb_next(t, true, self->cb_next_user_data)) {
        return self->cb_next(t, false, self->cb_next_user_data);
    }
    return true;
}

void llama_expert_trace::take_ids(int il, const ggml_tensor * t) {
    // the ids are a strided view of the sorted experts
    const int64_t n_row = t->ne[1];

    std::vector<int32_t>  row(t->ne[0]);
    std::vector<uint16_t> ids;
    for (int64_t i = 0; i < n_row; i++) {
        ggml_backend_tensor_get(t, row.data(), i * t->nb[1], row.size() * sizeof(int32_t));
        ids.insert(ids.end(), row.begin(), row.end());
    }
    if (n_ids == 0) {
        n_ids = t->ne[0];
    }
    if (n_ids != t->ne[0]) {
        fail("layers use different numbers of experts");
    }
    chosen[il] = std::move(ids);
}

void llama_expert_trace::take_probs(int il, const ggml_tensor * t) {
    if (t->type != GGML_TYPE_F32 || !ggml_is_contiguous(t)) {
        fail(std::string("the router's probabilities ") + t->name + " are not plain floats");
        return;
    }
    auto & values = probs[il];
    values.resize(ggml_nelements(t));
    ggml_backend_tensor_get(t, values.data(), 0, values.size() * sizeof(float));
}

void llama_expert_trace::begin_ubatch() {
    chosen.clear();
    probs.clear();
}

void llama_expert_trace::end_ubatch(const llama_ubatch & ubatch) {
    if (!err.empty() || chosen.empty()) {
        return;
    }
    if (ubatch.n_seqs_unq > 1) {
        fail("several sequences in one batch cannot be recorded as one trace");
        return;
    }
    if (n_layers == 0) {
        n_layers = chosen.size();
    }
    if ((int) chosen.size() != n_layers) {
        fail("the number of MoE layers changed");
        return;
    }
    if (n_tokens > 0 && ubatch.pos && ubatch.pos[0] == 0) {
        offs.push_back(n_tokens);
    }

    const size_t          n_rows = ubatch.n_tokens;
    std::vector<uint16_t> out(n_rows * n_layers * n_ids, NOT_COMPUTED);
    std::vector<float>    out_probs(file_probs ? out.size() : 0, 0.0f);

    int i_layer = 0;
    for (const auto & [il, ids] : chosen) {
        const size_t n_computed = ids.size() / n_ids;

        if (file_probs && probs[il].size() != ids.size()) {
            fail("layer " + std::to_string(il) + " shows no probabilities of its experts");
            return;
        }

        // the last layer is evaluated for the tokens whose logits are wanted only
        size_t i_row = 0;
        for (size_t it = 0; it < n_rows && i_row < n_computed; it++) {
            if (n_computed < n_rows && !ubatch.output[it]) {
                continue;
            }
            const size_t dst = (it * n_layers + i_layer) * n_ids;
            memcpy(&out[dst], &ids[i_row * n_ids], n_ids * sizeof(uint16_t));
            if (file_probs) {
                memcpy(&out_probs[dst], &probs[il][i_row * n_ids], n_ids * sizeof(float));
            }
            i_row++;
        }
        i_layer++;
    }
    if (fwrite(out.data(), sizeof(uint16_t), out.size(), file) != out.size() ||
        (file_probs && fwrite(out_probs.data(), sizeof(float), out_probs.size(), file_probs) != out_probs.size())) {
        fail(strerror(errno));
    }
    n_tokens += n_rows;
}

bool llama_expert_trace::finish() {
    if (!err.empty() || !file) {
        return false;
    }
    if (n_tokens == 0) {
        fail("nothing was recorded: no MoE layer was evaluated");
        return false;
    }
    offs.push_back(n_tokens);

    const std::string shape    = std::to_string(n_tokens) + ", " + std::to_string(n_layers) + ", " + std::to_string(n_ids);
    const uint64_t    n_values = (uint64_t) n_tokens * n_layers * n_ids;
    if (n_values * (sizeof(uint16_t) + (file_probs ? sizeof(float) : 0)) >= 0xffff0000u) {
        fail("more than 4 GiB");
        return false;
    }
    std::vector<zip_entry> entries = { ENTRY_IDS };
    std::vector<uint8_t>   buf(1 << 20);

    // ids: the header, then the checksum over what is in the file
    {
        zip_entry &       e      = entries[0];
        const std::string header = npy_header("<u2", shape);

        e.size = header.size() + n_values * sizeof(uint16_t);
        e.crc  = crc32_update(0, header.data(), header.size());

        fflush(file);
        fseek(file, ids_data_start(), SEEK_SET);
        for (size_t n; (n = fread(buf.data(), 1, buf.size(), file)) > 0;) {
            e.crc = crc32_update(e.crc, buf.data(), n);
        }
        const std::string head = zip_local(e) + header;
        fseek(file, 0, SEEK_SET);
        fwrite(head.data(), 1, head.size(), file);
        fseek(file, 0, SEEK_END);
    }

    const auto add = [&](const std::string & name, const std::string & data) {
        zip_entry         e   = { name, (uint64_t) ftell(file), data.size(), crc32_update(0, data.data(), data.size()) };
        const std::string out = zip_local(e) + data;
        fwrite(out.data(), 1, out.size(), file);
        entries.push_back(e);
    };

    if (file_probs) {
        const std::string header = npy_header("<f4", shape);
        zip_entry         e      = { "probs.npy", (uint64_t) ftell(file), header.size() + n_values * sizeof(float), crc32_update(0, header.data(), header.size()) };

        // read twice: the checksum comes before the values
        fflush(file_probs);
        fseek(file_probs, 0, SEEK_SET);
        for (size_t n; (n = fread(buf.data(), 1, buf.size(), file_probs)) > 0;) {
            e.crc = crc32_update(e.crc, buf.data(), n);
        }
        const std::string head = zip_local(e) + header;
        fwrite(head.data(), 1, head.size(), file);
        fseek(file_probs, 0, SEEK_SET);
        for (size_t n; (n = fread(buf.data(), 1, buf.size(), file_probs)) > 0;) {
            fwrite(buf.data(), 1, n, file);
        }
        entries.push_back(e);
    }

    std::string data = npy_header("<i8", std::to_string(offs.size()) + ",");
    for (const int64_t o : offs) {
        put(data, o, 8);
    }
    add("offs.npy", data);

    std::string name;
    for (const char c : model) {
        name += c < 0x20 || c == '"' || c == '\\' || (unsigned char) c > 0x7e ? '?' : c;
    }
    const std::string meta = "{\"model\": \"" + name + "\", \"layers\": " + std::to_string(n_layers) + ", \"experts\": " + std::to_string(n_expert) +
        ", \"top_k\": " + std::to_string(n_ids) + ", \"phase\": \"recorded\", " + meta_more + "\"source\": \"llama.cpp --expert-trace\", \"licence\": \"\"}";
    data = npy_header("<U" + std::to_string(meta.size()), "");
    for (const char c : meta) {
        put(data, (uint8_t) c, 4);
    }
    add("meta.npy", data);

    std::string dir;
    for (const auto & e : entries) {
        put(dir, 0x02014b50, 4);
        put(dir, 20, 2); // version made by
        dir += zip_common(e);
        put(dir, 0, 2);  // comment
        put(dir, 0, 2);  // disk
        put(dir, 0, 2);  // internal attributes
        put(dir, 0, 4);  // external attributes
        put(dir, e.offs, 4);
        dir += e.name;
    }
    const uint64_t dir_offs = ftell(file);
    const size_t   dir_size = dir.size();
    put(dir, 0x06054b50, 4);
    put(dir, 0, 4);
    put(dir, entries.size(), 2);
    put(dir, entries.size(), 2);
    put(dir, dir_size, 4);
    put(dir, dir_offs, 4);
    put(dir, 0, 2);
    fwrite(dir.data(), 1, dir.size(), file);

    bool ok = fflush(file) == 0 && !ferror(file) && !(file_probs && ferror(file_probs));
#ifndef _WIN32
    ok = ok && fsync(fileno(file)) == 0;
#endif
    ok   = fclose(file) == 0 && ok;
    file = nullptr;
    ok   = ok && rename(path_tmp.c_str(), path.c_str()) == 0;
    if (!ok) {
        fail(strerror(errno));
        remove(path_tmp.c_str());
    }
    discard();
    return ok;
}

//
// C API
//

bool llama_expert_trace_start(llama_context * ctx, const char * path, bool probs) {
    return ctx->expert_trace_start(path, probs);
}

bool llama_expert_trace_stop(llama_context * ctx) {
    return ctx->expert_trace_stop();
}

bool llama_context::expert_trace_start(const char * path, bool probs) {
    expert_trace_stop();
    try {
        char desc[128];
        llama_model_desc(&model, desc, sizeof(desc));

        std::string meta_more; // whoever reads the trace has to know that it is not the model's own routing
        if (cparams.expert_bias) {
            meta_more = format("\"route_bias\": %g, \"route_keep\": %d, ", cparams.expert_bias->config.route_bias, cparams.expert_bias->config.route_keep);
        }
        expert_trace = std::make_unique<llama_expert_trace>(path, model.name + " (" + desc + ")", meta_more, model.hparams.n_expert, probs, cparams.cb_eval, cparams.cb_eval_user_data);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return false;
    }
    cparams.cb_eval           = llama_expert_trace::eval_callback;
    cparams.cb_eval_user_data = expert_trace.get();
    ggml_backend_sched_set_eval_callback(sched.get(), cparams.cb_eval, cparams.cb_eval_user_data);

    return true;
}

bool llama_context::expert_trace_stop() {
    if (!expert_trace) {
        return true;
    }
    const bool ok = expert_trace->finish();

    cparams.cb_eval           = expert_trace->cb_next;
    cparams.cb_eval_user_data = expert_trace->cb_next_user_data;
    ggml_backend_sched_set_eval_callback(sched.get(), cparams.cb_eval, cparams.cb_eval_user_data);
    expert_trace.reset();

    return ok;
}
