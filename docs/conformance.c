/* Level L1 of npllama's conformance vectors in C99: cc -O2 -o l1 conformance.c -lm && ./l1 VECTORS RESULTS
   VECTORS/L1.txt has a line for each case:  L1/rms_norm/unit rms_norm x.f32[5,80] weight.f32[80] eps=1e-05 -> y[5,80] */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#define EACH(i, n) for (long i = 0; i < (n); i++)
typedef struct { char name[64]; float *x; long n, s[4]; } Array; /* n numbers; s: sizes of the last four axes, 1 for none */
static Array in[3], out[2];
static float *x, *w, *z, *y; /* the numbers of the inputs, NULL for none, and of the first output */
static char line[1024], path[64], op[32], file[512];

static double number(const char *key) { /* 1e-05 for " eps="; 0 where the case has none */
    return strstr(line, key) ? strtod(strstr(line, key) + strlen(key), NULL) : 0;
}
static void embed(void) { EACH(i, out->n) y[i] = w[(long)x[i / out->s[3]] * out->s[3] + i % out->s[3]]; }
static void linear(void) { /* scales z: one for each row of w, for each 32 numbers, or none */
    long D = in->s[3], rows = out->s[3];
    EACH(i, out->n) EACH(j, D) {
        long at = i % rows * D + j;
        y[i] += x[i / rows * D + j] * w[at] * (z ? z[at * in[2].n / in[1].n] : 1);
    }
}
static void rms_norm(void) {
    for (long D = in->s[3], t = 0; t < in->n; t += D) {
        float sum = 0;
        EACH(i, D) sum += x[t + i] * x[t + i];
        EACH(i, D) y[t + i] = x[t + i] / sqrtf(sum / D + (float)number(" eps=")) * w[i];
    }
}
static void softmax(void) {
    for (long D = in->s[3], t = 0; t < in->n; t += D) {
        float largest = -INFINITY, sum = 0;
        EACH(i, D) largest = fmaxf(largest, x[t + i]);
        EACH(i, D) sum += y[t + i] = expf(x[t + i] - largest);
        EACH(i, D) y[t + i] /= sum;
    }
}
static void swiglu(void) { EACH(i, out->n) y[i] = x[i] / (1 + expf(-x[i])) * (w ? w[i] : 1); } /* and silu */
static float frequency(long j, long K) { /* θ^(-2j/K), divided by the scaling's factor, or blended by its wavelength */
    double f = pow(number(" theta="), -2.0 * j / K), factor = number(" factor="), low = number(" low_freq_factor=");
    double turns = number(" original_max_seq_len=") * f / (2 * acos(-1)), high = number(" high_freq_factor=");
    double kept = high ? fmin(fmax((turns - low) / (high - low), 0), 1) : 0;
    return factor ? (1 - kept) * f / factor + kept * f : f;
}
static void rope_frequencies(void) { EACH(j, out->n) y[j] = frequency(j, 2 * out->n); }
static void rope_rotation(void) {
    EACH(i, out->n) y[i] = cosf(x[i / in[1].n] * w[i % in[1].n]), out[1].x[i] = sinf(x[i / in[1].n] * w[i % in[1].n]);
}
static void rope(void) { /* by cosines w and sines z, also of halves; rope_at: at positions w */
    long K = in->s[3], half = K / 2, halves = !strcmp(op, "rope_half_split");
    EACH(i, in->n / 2) {
        long j = i % half, t = i / half / in->s[2], a = i / half * K + (halves ? j : 2 * j), b = a + (halves ? half : 1);
        float angle = z ? 0 : w[t] * frequency(j, K);
        float c = z ? w[t * half + j] : cosf(angle), s = z ? z[t * half + j] : sinf(angle);
        y[a] = x[a] * c - x[b] * s, y[b] = x[a] * s + x[b] * c;
    }
}
static void causal_mask(void) { /* queries [..., T], slots [..., S] -> [..., 1, T, S] */
    long T = in->s[3], S = in[1].s[3];
    EACH(i, out->n) y[i] = w[i / (T * S) * S + i % S] <= x[i / S] ? 0 : -INFINITY;
}
static void attention_scores(void) { /* q [B, T, H, K], keys [B, G, S, K], mask [B, 1, T, S] -> [B, H, T, S] */
    long T = in->s[1], H = in->s[2], K = in->s[3], G = in[1].s[1], S = in[1].s[2];
    EACH(i, out->n) {
        long s = i % S, t = i / S % T, h = i / (S * T) % H, b = i / (S * T * H);
        EACH(j, K) y[i] += x[((b * T + t) * H + h) * K + j] * w[((b * G + h / (H / G)) * S + s) * K + j];
        y[i] = y[i] / sqrtf(K) + z[(b * T + t) * S + s];
    }
}
static void attention_heads(void) { /* weights [H, T, S], values [G, S, K] -> [T, H, K] */
    long H = in->s[1], T = in->s[2], S = in->s[3], G = in[1].s[1], K = in[1].s[3];
    EACH(i, out->n) EACH(s, S) y[i] += x[(i / K % H * T + i / (K * H)) * S + s] * w[(i / K % H / (H / G) * S + s) * K + i % K];
}
static void rounded(void) { /* to the nearest number of 8 or 11 bits, ties to even */
    int bits = strcmp(op, "round_float16") ? 8 : 11, least = bits == 8 ? -126 : -14;
    EACH(i, out->n) {
        float unit = ldexpf(1, (x[i] != 0 && ilogbf(x[i]) > least ? ilogbf(x[i]) : least) + 1 - bits);
        y[i] = nearbyintf(x[i] / unit) * unit;
        if (bits == 11 && fabsf(y[i]) > 65504) y[i] = copysignf(INFINITY, y[i]);
    }
}
static const struct { const char *name; void (*run)(void); } operations[] = {
    {"embed", embed}, {"linear", linear}, {"linear_bfloat16", linear}, {"linear_int8", linear}, {"linear_groups", linear},
    {"rms_norm", rms_norm}, {"softmax", softmax}, {"silu", swiglu}, {"swiglu", swiglu}, {"rope_frequencies", rope_frequencies},
    {"rope_rotation", rope_rotation}, {"rope", rope}, {"rope_half_split", rope}, {"rope_at", rope}, {"causal_mask", causal_mask},
    {"attention_scores", attention_scores}, {"attention_heads", attention_heads}, {"round_bfloat16", rounded},
    {"round_float16", rounded},
};

static void open_array(Array *a, char *shape, const char *folder) { /* name[shape]; read from a folder, or zeros */
    char *name = shape;
    long sizes[4], axes = 0;
    while (name[-1] != ' ') name--;
    snprintf(a->name, sizeof a->name, "%.*s", (int)(shape - name), name);
    while (*shape != ']') sizes[axes++] = strtol(shape + 1, &shape, 10);
    a->n = 1;
    EACH(i, 4) a->n *= a->s[i] = i < 4 - axes ? 1 : sizes[i - 4 + axes];
    if (!(a->x = calloc(a->n, sizeof *a->x)) || !folder) return;
    snprintf(file, sizeof file, "%s/%s/%s", folder, path, a->name);
    FILE *f = fopen(file, "rb");
    int size = strstr(file, ".i64") ? 8 : strstr(file, ".f32") ? 4 : strstr(file, ".u16") ? 2 : 1;
    EACH(i, a->n) { /* bfloat16 is the upper half of a float32 */
        union { char bytes[8]; int64_t i64; float f32; int8_t i8; } v = {{0}};
        if (!f || !fread(v.bytes + (size == 2 ? 2 : 0), size, 1, f)) exit(2);
        a->x[i] = size == 8 ? v.i64 : size == 1 ? v.i8 : v.f32;
    }
    fclose(f);
}
static void save(const Array *a, const char *folder) {
    snprintf(file, sizeof file, "%s/%s/%s.f32", folder, path, a->name);
    for (char *p = file + 1; (p = strchr(p, '/')); *p++ = '/') *p = 0, mkdir(file, 0777);
    FILE *f = fopen(file, "wb");
    if (!f || fwrite(a->x, sizeof *a->x, a->n, f) != (size_t)a->n || fclose(f)) exit(2);
}
int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: l1 VECTORS RESULTS\n"), 2;
    snprintf(file, sizeof file, "%s/L1.txt", argv[1]);
    FILE *list = fopen(file, "r");
    while (list && fgets(line, sizeof line, list) && sscanf(line, "%63s %31s", path, op) == 2) {
        char *arrow = strstr(line, "->");
        int inputs = 0, outputs = 0;
        for (char *at = line; (at = strchr(at, '[')); at++)
            open_array(at < arrow ? &in[inputs++] : &out[outputs++], at, at < arrow ? argv[1] : NULL);
        x = in[0].x, w = inputs > 1 ? in[1].x : NULL, z = inputs > 2 ? in[2].x : NULL, y = out[0].x;
        EACH(i, (long)(sizeof operations / sizeof *operations)) if (!strcmp(op, operations[i].name)) operations[i].run();
        EACH(i, inputs) free(in[i].x);
        EACH(i, outputs) save(&out[i], argv[2]), free(out[i].x);
    }
    return list ? fclose(list) : (perror(file), 2);
}
