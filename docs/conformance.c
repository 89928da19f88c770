/* Level L1 of npllama's conformance vectors in C: cc -O2 -o l1 conformance.c -lm && ./l1 VECTORS RESULTS
   Then: npllama conformance check RESULTS --vectors VECTORS. rope_at, rope_frequencies and round_float16 are left to you. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static char json[1 << 16], path[256], file[4096]; /* of the case at hand */
static const char *vectors, *results;

static const char *after(const char *at, const char *key) { /* what follows "key": in case.json */
    char quoted[80];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    return strstr(at, quoted) ? strstr(at, quoted) + strlen(quoted) : (exit(2), NULL);
}

static long size(const char *name, int axis) { /* of an array; axis 1 is the last; 0: all of it */
    long shape[8], n = 0, all = 1;
    for (char *p = strchr(after(after(json, name), "shape"), '['); *p != ']'; all *= shape[n++], p += strspn(p, " \n")) shape[n] = strtol(p + 1, &p, 10);
    return axis > n ? 1 : axis ? shape[n - axis] : all;
}

static float *array(const char *name) { /* float32, int64, int8 or bfloat16, as float */
    const char *endings[] = {"f32", "i64", "i8", "u16"};
    long n = size(name, 0);
    float *x = malloc(n * sizeof *x + 1);
    for (int kind = 0; kind < 4; kind++) {
        snprintf(file, sizeof file, "%s/%s/%s.%s", vectors, path, name, endings[kind]);
        FILE *f = fopen(file, "rb");
        for (long i = 0; f && i < n; i++) {
            union { float f; int64_t i; int8_t b; uint16_t h; uint32_t u; } v = {.i = 0};
            if (!fread(&v, kind == 1 ? 8 : kind == 0 ? 4 : kind == 2 ? 1 : 2, 1, f)) exit(2);
            if (kind == 3) v.u = (uint32_t)v.h << 16;
            x[i] = kind == 1 ? v.i : kind == 2 ? v.b : v.f;
        }
        if (f) return fclose(f), x;
    }
    return NULL;
}

static void save(const char *name, const float *y) {
    snprintf(file, sizeof file, "%s/%s/%s.f32", results, path, name);
    for (char *p = file + 1; (p = strchr(p, '/')); *p++ = '/') *p = 0, mkdir(file, 0777);
    FILE *f = fopen(file, "wb");
    if (!f || fwrite(y, sizeof *y, size(name, 0), f) != (size_t)size(name, 0) || fclose(f)) exit(2);
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: l1 VECTORS RESULTS\n"), 2;
    vectors = argv[1], results = argv[2];
    char op[64], list[4096];
    snprintf(list, sizeof list, "%s/L1.txt", vectors);
    for (FILE *cases = fopen(list, "r"); cases && fscanf(cases, "%255s %63s", path, op) == 2;) {
        snprintf(file, sizeof file, "%s/%s/case.json", vectors, path);
        FILE *f = fopen(file, "rb");
        if (!f) return 2;
        json[fread(json, 1, sizeof json - 1, f)] = 0, fclose(f);
#define IS(name) !strcmp(op, name)
#define EACH(i, n) for (long i = 0; i < (n); i++)
        if (IS("embed") || !strncmp(op, "linear", 6) || IS("rms_norm") || IS("softmax") || IS("silu") || IS("round_bfloat16")) {
            const char *in = IS("embed") ? "tokens" : "x";
            float *x = array(in), *w = strstr(json, "\"weight\": {") ? array("weight") : NULL, *s = strstr(json, "\"scale\": {") ? array("scale") : NULL;
            long D = size(in, 1), n = size(in, 0), out = size("y", 1);
            float *y = malloc(size("y", 0) * sizeof *y);
            if (IS("embed")) EACH(t, n) memcpy(y + t * out, w + (long)x[t] * out, out * sizeof *y);
            if (IS("silu")) EACH(i, n) y[i] = x[i] / (1 + expf(-x[i]));
            if (IS("round_bfloat16")) EACH(i, n) {
                uint32_t u;
                memcpy(&u, x + i, 4), u = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000, memcpy(y + i, &u, 4);
            }
            if (!strncmp(op, "linear", 6)) EACH(t, n / D) EACH(o, out) {
                float sum = 0;
                EACH(i, D) sum += x[t * D + i] * w[o * D + i] * (IS("linear_int8") ? s[o] : s ? s[o * (D / 32) + i / 32] : 1);
                y[t * out + o] = sum;
            }
            if (IS("rms_norm")) EACH(t, n / D) {
                float sum = 0, eps = strtod(after(json, "eps"), NULL);
                EACH(i, D) sum += x[t * D + i] * x[t * D + i];
                EACH(i, D) y[t * D + i] = x[t * D + i] / sqrtf(sum / D + eps) * w[i];
            }
            if (IS("softmax")) EACH(t, n / D) {
                float *row = x + t * D, largest = row[0], sum = 0;
                EACH(i, D) largest = fmaxf(largest, row[i]);
                EACH(i, D) sum += expf(row[i] - largest);
                EACH(i, D) y[t * D + i] = expf(row[i] - largest) / sum;
            }
            save("y", y);
        } else if (IS("swiglu")) {
            float *gate = array("gate"), *up = array("up");
            EACH(i, size("y", 0)) up[i] *= gate[i] / (1 + expf(-gate[i]));
            save("y", up);
        } else if (IS("rope_rotation")) {
            long n = size("positions", 0), half = size("frequencies", 1);
            float *m = array("positions"), *theta = array("frequencies"), *c = malloc(n * half * 4), *s = malloc(n * half * 4);
            EACH(i, n * half) c[i] = cosf(m[i / half] * theta[i % half]), s[i] = sinf(m[i / half] * theta[i % half]);
            save("cos", c), save("sin", s);
        } else if (IS("rope") || IS("rope_half_split")) {
            long heads = size("x", 2), K = size("x", 1), pairs = size("x", 0) / 2;
            float *x = array("x"), *c = array("cos"), *s = array("sin");
            EACH(i, pairs) {
                long j = i % (K / 2), head = i / (K / 2), at = head / heads * (K / 2) + j;
                float *a = x + head * K + (IS("rope") ? 2 * j : j), *b = a + (IS("rope") ? 1 : K / 2), old = *a;
                *a = old * c[at] - *b * s[at], *b = old * s[at] + *b * c[at];
            }
            save("y", x);
        } else if (IS("causal_mask")) {
            long T = size("query_positions", 1), S = size("slot_positions", 1), n = size("mask", 0);
            float *q = array("query_positions"), *slot = array("slot_positions"), *y = malloc(n * 4);
            EACH(i, n) y[i] = slot[i / (T * S) * S + i % S] <= q[i / S] ? 0 : -INFINITY;
            save("mask", y);
        } else if (IS("attention_scores")) {
            long T = size("q", 3), H = size("q", 2), K = size("q", 1), G = size("keys", 3), S = size("keys", 2), n = size("scores", 0);
            float *q = array("q"), *k = array("keys"), *mask = array("mask"), *y = calloc(n, 4);
            EACH(i, n) { /* [B, H, T, S] */
                long s = i % S, t = i / S % T, h = i / (S * T) % H, b = i / (S * T * H);
                EACH(j, K) y[i] += q[((b * T + t) * H + h) * K + j] * k[((b * G + h / (H / G)) * S + s) * K + j];
                y[i] = y[i] / sqrtf(K) + mask[(b * T + t) * S + s];
            }
            save("scores", y);
        } else if (IS("attention_heads")) {
            long H = size("weights", 3), T = size("weights", 2), S = size("weights", 1), G = size("values", 3), K = size("values", 1);
            float *w = array("weights"), *v = array("values"), *y = calloc(T * H * K, 4);
            EACH(i, T * H * K) EACH(s, S) y[i] += w[(i / K % H * T + i / (K * H)) * S + s] * v[((i / K % H) / (H / G) * S + s) * K + i % K];
            save("heads", y);
        }
    }
    return 0;
}
