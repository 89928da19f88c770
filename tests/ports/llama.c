/* A Llama forward pass in plain C, as somebody might write it from the paper: loops, float32, no libraries.

   usage: llama MODEL_DIR OUT_DIR ID [ID ...]

   Reads npllama's model directory and writes every activation of a prompt to OUT_DIR as raw float32, with a shapes.json. It has
   one mistake, the subject of docs/finding-a-bug.md; compiled with -DFIXED it hasn't.

   x [T][D] is the residual stream; T tokens, D dim, H heads, G key/value heads, K head_dim, F ffn_dim, V vocab_size. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *model_dir, *out_dir;
static FILE *shapes;

static void fail(const char *what, const char *where) {
    fprintf(stderr, "llama: %s %s\n", what, where);
    exit(2);
}

static void *allocate(size_t n, size_t size) {
    void *p = calloc(n, size);
    if (!p) fail("out of", "memory");
    return p;
}

static FILE *open_file(const char *folder, const char *name, const char *ending, const char *mode) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s%s", folder, name, ending);
    FILE *file = fopen(path, mode);
    if (!file) fail("can't open", path);
    return file;
}

/* The number after "key": in config.json. */
static double constant(const char *config, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *at = strstr(config, quoted);
    if (!at) fail("config.json lacks", key);
    return strtod(at + strlen(quoted), NULL);
}

/* n numbers of an .npy file: 10 bytes of preamble, a header of the length they tell, then float32 or bfloat16 (uint16). */
static float *parameter(const char *name, size_t n) {
    FILE *file = open_file(model_dir, name, ".npy", "rb");
    unsigned char preamble[10];
    char header[65536];
    if (fread(preamble, 1, 10, file) != 10) fail("cut off:", name);
    size_t length = preamble[8] | preamble[9] << 8;
    if (fread(header, 1, length, file) != length) fail("cut off:", name);
    header[length] = 0;
    float *x = allocate(n, sizeof *x);
    if (strstr(header, "<f4")) {
        if (fread(x, 4, n, file) != n) fail("cut off:", name);
    } else if (strstr(header, "<u2")) {
        uint16_t *packed = allocate(n, sizeof *packed);
        if (fread(packed, 2, n, file) != n) fail("cut off:", name);
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)packed[i] << 16;
            memcpy(&x[i], &bits, 4);
        }
        free(packed);
    } else fail("expected float32 or bfloat16:", name);
    fclose(file);
    return x;
}

static float *layer_parameter(int layer, const char *name, size_t n) {
    char full[256];
    snprintf(full, sizeof full, "layers.%d.%s.weight", layer, name);
    return parameter(full, n);
}

/* Write an activation, and its shape, to be compared. Dimensions of 0 are left out. */
static void dump(int layer, const char *name, const float *x, int a, int b, int c) {
    char full[256];
    if (layer >= 0) snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    else snprintf(full, sizeof full, "%s", name);
    size_t n = (size_t)a * b * (c ? c : 1);
    FILE *file = open_file(out_dir, full, ".f32", "wb");
    if (fwrite(x, sizeof *x, n, file) != n) fail("can't write", full);
    fclose(file);
    fprintf(shapes, "%s\n \"%s\": [%d, %d", ftell(shapes) > 1 ? "," : "", full, a, b);
    fprintf(shapes, c ? ", %d]" : "]", c);
}

/* y[T][n_out] = x[T][n_in] W^T */
static void linear(float *y, const float *x, const float *w, int T, int n_in, int n_out) {
    for (int t = 0; t < T; t++)
        for (int o = 0; o < n_out; o++) {
            float sum = 0;
            for (int i = 0; i < n_in; i++) sum += x[t * n_in + i] * w[(size_t)o * n_in + i];
            y[t * n_out + o] = sum;
        }
}

static void rms_norm(float *y, const float *x, const float *w, float eps, int T, int D) {
    for (int t = 0; t < T; t++) {
        float sum = 0;
        for (int i = 0; i < D; i++) sum += x[t * D + i] * x[t * D + i];
        float scale = 1 / sqrtf(sum / D + eps);
        for (int i = 0; i < D; i++) y[t * D + i] = x[t * D + i] * scale * w[i];
    }
}

/* Turn the pairs of each head's numbers by position times frequency. */
static void rope(float *x, float theta, int T, int heads, int K) {
    for (int t = 0; t < T; t++)
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < K; j += 2) {
                float angle = t * powf(theta, -(float)j / K);
                float *pair = x + ((size_t)t * heads + h) * K + j, a = pair[0], b = pair[1];
                pair[0] = a * cosf(angle) - b * sinf(angle);
                pair[1] = a * sinf(angle) + b * cosf(angle);
            }
}

int main(int argc, char **argv) {
    if (argc < 4) fail("usage:", "llama MODEL_DIR OUT_DIR ID [ID ...]");
    model_dir = argv[1], out_dir = argv[2];
    int T = argc - 3;
    char config[65536] = {0};
    FILE *file = open_file(model_dir, "config", ".json", "rb");
    if (!fread(config, 1, sizeof config - 1, file)) fail("empty:", "config.json");
    fclose(file);
    int D = constant(config, "dim"), L = constant(config, "n_layers"), H = constant(config, "n_heads");
    int G = constant(config, "n_kv_heads"), K = constant(config, "head_dim"), F = constant(config, "ffn_dim");
    int V = constant(config, "vocab_size");
    float eps = constant(config, "norm_eps");
#ifdef FIXED
    float theta = constant(config, "rope_theta");
#else
    float theta = 10000; /* as in Llama 2 */
#endif
    shapes = open_file(out_dir, "shapes", ".json", "w");
    fprintf(shapes, "{");

    float *embedding = parameter("tok_embeddings.weight", (size_t)V * D);
    float *x = allocate((size_t)T * D, 4), *normed = allocate((size_t)T * D, 4), *out = allocate((size_t)T * D, 4);
    float *q = allocate((size_t)T * H * K, 4), *k = allocate((size_t)T * G * K, 4), *v = allocate((size_t)T * G * K, 4);
    float *scores = allocate((size_t)H * T * T, 4), *heads = allocate((size_t)T * H * K, 4);
    float *gate = allocate((size_t)T * F, 4), *up = allocate((size_t)T * F, 4), *logits = allocate((size_t)T * V, 4);
    for (int t = 0; t < T; t++) {
        int id = atoi(argv[3 + t]);
        if (id < 0 || id >= V) fail("outside of the vocabulary:", argv[3 + t]);
        memcpy(x + (size_t)t * D, embedding + (size_t)id * D, D * sizeof *x);
    }
    dump(-1, "tok_embeddings", x, T, D, 0);

    for (int l = 0; l < L; l++) {
        float *w = layer_parameter(l, "attention_norm", D);
        rms_norm(normed, x, w, eps, T, D);
        free(w);
        dump(l, "attention_norm", normed, T, D, 0);
        float *wq = layer_parameter(l, "attention.wq", (size_t)H * K * D), *wk = layer_parameter(l, "attention.wk", (size_t)G * K * D);
        float *wv = layer_parameter(l, "attention.wv", (size_t)G * K * D), *wo = layer_parameter(l, "attention.wo", (size_t)D * H * K);
        linear(q, normed, wq, T, D, H * K);
        linear(k, normed, wk, T, D, G * K);
        linear(v, normed, wv, T, D, G * K);
        dump(l, "attention.q", q, T, H, K);
        dump(l, "attention.k", k, T, G, K);
        dump(l, "attention.v", v, T, G, K);
        rope(q, theta, T, H, K);
        rope(k, theta, T, G, K);
        dump(l, "attention.q_rope", q, T, H, K);
        dump(l, "attention.k_rope", k, T, G, K);

        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++)
                for (int s = 0; s < T; s++) {
                    float sum = 0;
                    for (int i = 0; i < K; i++) sum += q[(t * H + h) * K + i] * k[(s * G + h / (H / G)) * K + i];
                    scores[(h * T + t) * T + s] = s <= t ? sum / sqrtf(K) : -INFINITY;
                }
        dump(l, "attention.scores", scores, H, T, T);
        for (int row = 0; row < H * T; row++) {
            float *p = scores + (size_t)row * T, largest = p[0], sum = 0;
            for (int s = 1; s < T; s++) largest = fmaxf(largest, p[s]);
            for (int s = 0; s < T; s++) sum += p[s] = expf(p[s] - largest);
            for (int s = 0; s < T; s++) p[s] /= sum;
        }
        dump(l, "attention.weights", scores, H, T, T);
        for (int t = 0; t < T; t++)
            for (int h = 0; h < H; h++)
                for (int i = 0; i < K; i++) {
                    float sum = 0;
                    for (int s = 0; s <= t; s++) sum += scores[(h * T + t) * T + s] * v[(s * G + h / (H / G)) * K + i];
                    heads[(t * H + h) * K + i] = sum;
                }
        dump(l, "attention.heads", heads, T, H, K);
        linear(out, heads, wo, T, H * K, D);
        dump(l, "attention.out", out, T, D, 0);
        for (int i = 0; i < T * D; i++) x[i] += out[i];
        dump(l, "attention_residual", x, T, D, 0);
        free(wq), free(wk), free(wv), free(wo);

        w = layer_parameter(l, "ffn_norm", D);
        rms_norm(normed, x, w, eps, T, D);
        free(w);
        dump(l, "ffn_norm", normed, T, D, 0);
        float *w1 = layer_parameter(l, "feed_forward.w1", (size_t)F * D), *w3 = layer_parameter(l, "feed_forward.w3", (size_t)F * D);
        float *w2 = layer_parameter(l, "feed_forward.w2", (size_t)D * F);
        linear(gate, normed, w1, T, D, F);
        linear(up, normed, w3, T, D, F);
        dump(l, "feed_forward.gate", gate, T, F, 0);
        dump(l, "feed_forward.up", up, T, F, 0);
        for (int i = 0; i < T * F; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
        dump(l, "feed_forward.act", gate, T, F, 0);
        linear(out, gate, w2, T, F, D);
        dump(l, "feed_forward.out", out, T, D, 0);
        for (int i = 0; i < T * D; i++) x[i] += out[i];
        dump(l, "out", x, T, D, 0);
        free(w1), free(w2), free(w3);
    }
    float *w = parameter("norm.weight", D);
    rms_norm(normed, x, w, eps, T, D);
    dump(-1, "norm", normed, T, D, 0);
    float *output = strstr(config, "\"tied_embeddings\": true") ? embedding : parameter("output.weight", (size_t)V * D);
    linear(logits, normed, output, T, D, V);
    dump(-1, "logits", logits, T, V, 0);
    fprintf(shapes, "\n}\n");
    return fclose(shapes) ? 2 : 0;
}
