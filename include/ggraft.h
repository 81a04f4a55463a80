/* ggraft: tiny trained adapters (prefix, prompt and P-tuning) on frozen, memory-mapped, quantized language models.
 *
 * Made by cbindgen from src/capi: do not edit. The guide is docs/C_API.md.
 *
 * Functions return GGRAFT_OK or a negative ggraft_status; ggraft_last_error() tells what happened. Strings are UTF-8 and
 * NUL-terminated. Fill params structs with their init function, then change what you need.
 *
 * Threads: a model and an adapter may be used by any number of threads at once. A session, sampler, text stream or
 * trainer is for one thread at a time (GGRAFT_ERROR_BUSY otherwise), but ggraft_session_cancel, ggraft_trainer_cancel and
 * ggraft_trainer_poll may be called from any thread.
 */


#ifndef GGRAFT_H
#define GGRAFT_H

#include <stddef.h>
#include <stdint.h>
/* The functions of llama.h that ggraft_host_new asks for. A ggraft_find_callback for a static libllama:
 *
 *     static ggraft_function find(const char *name, void *user_data) {
 *     #define FIND(f) if (strcmp(name, #f) == 0) return (ggraft_function)f;
 *         GGRAFT_HOST_FUNCTIONS(FIND)
 *         return NULL;
 *     }
 */
#define GGRAFT_HOST_FUNCTIONS(F) \
    F(llama_get_model) F(llama_get_memory) F(llama_n_ctx) F(llama_n_batch) F(llama_n_seq_max) \
    F(llama_model_get_vocab) F(llama_model_n_layer) F(llama_model_n_embd) F(llama_model_n_swa) \
    F(llama_model_is_recurrent) F(llama_model_is_hybrid) F(llama_model_has_encoder) \
    F(llama_model_meta_val_str) F(llama_vocab_n_tokens) F(llama_vocab_bos) F(llama_vocab_get_add_bos) \
    F(llama_tokenize) F(llama_memory_seq_rm) F(llama_memory_seq_cp) F(llama_memory_seq_pos_max) \
    F(llama_state_seq_get_size) F(llama_state_seq_get_data) F(llama_state_seq_set_data) F(llama_decode)


// Grows when a change of the library breaks programs that were compiled with an older header.
#define GGRAFT_ABI_VERSION 1

// Seed that stands for a random one.
#define GGRAFT_RANDOM_SEED UINT32_MAX

// Of `ggraft_host_steer`: to the last layer.
#define GGRAFT_LAST_LAYER UINT32_MAX

// What a function returns: zero, or a negative number for each class of error. Numbers never change their meaning; new ones
// may join. `ggraft_last_error` tells the details.
enum ggraft_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Success.
  GGRAFT_OK = 0,
  // A pointer that must not be NULL is NULL.
  GGRAFT_ERROR_NULL = -1,
  // An argument or a field of a params struct is out of range.
  GGRAFT_ERROR_ARGUMENT = -2,
  // A string is not UTF-8.
  GGRAFT_ERROR_UTF8 = -3,
  // The buffer is too small; the size that is needed was stored.
  GGRAFT_ERROR_BUFFER = -4,
  // The operating system refused to read or write a file.
  GGRAFT_ERROR_IO = -5,
  // A GGUF file is malformed.
  GGRAFT_ERROR_GGUF = -6,
  // The model is not one that this library runs.
  GGRAFT_ERROR_MODEL = -7,
  // The tokenizer or the chat template cannot be used, or the text cannot be tokenized.
  GGRAFT_ERROR_VOCAB = -8,
  // A PEFT folder is malformed or of a kind that is not supported.
  GGRAFT_ERROR_PEFT = -9,
  // An adapter is malformed, or cannot be used in this way.
  GGRAFT_ERROR_ADAPTER = -10,
  // The adapter was made for another base model.
  GGRAFT_ERROR_ADAPTER_MISMATCH = -11,
  // The text does not fit into the context.
  GGRAFT_ERROR_CONTEXT_FULL = -12,
  // The session or the trainer was cancelled.
  GGRAFT_ERROR_CANCELLED = -13,
  // Memory ran out.
  GGRAFT_ERROR_MEMORY = -14,
  // The model computed values that are not finite: its weights or the adapter are damaged, or a learning rate is too high.
  GGRAFT_ERROR_NON_FINITE = -15,
  // The session is not in a state for this: an adapter is attached already or none is, or nothing was computed yet.
  GGRAFT_ERROR_STATE = -16,
  // The handle is in use, by another thread or by the function that called this callback.
  GGRAFT_ERROR_BUSY = -17,
  // The process has a log receiver already that this library cannot replace.
  GGRAFT_ERROR_LOG = -18,
  // A checkpoint is damaged, or of another run.
  GGRAFT_ERROR_CHECKPOINT = -21,
  // A defect of this library. The handle that was in use refuses further work; others are not affected.
  GGRAFT_ERROR_INTERNAL = -19,
  // A row of a data set cannot be used.
  GGRAFT_ERROR_DATA = -20,
  // A saved session is damaged, or was saved with another model, adapter or KV cache.
  GGRAFT_ERROR_SAVED = -22,
  // An application's llama_context cannot take an adapter, or one of its functions failed.
  GGRAFT_ERROR_HOST = -23,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_status ggraft_status;
#else
typedef int32_t ggraft_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What an adapter does to its base.
enum ggraft_adapter_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Key and value rows in every layer.
  GGRAFT_ADAPTER_PREFIX = 0,
  // Virtual tokens in front of the text.
  GGRAFT_ADAPTER_PROMPT = 1,
  // Virtual tokens where a template says.
  GGRAFT_ADAPTER_P_TUNING = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_adapter_kind ggraft_adapter_kind;
#else
typedef int32_t ggraft_adapter_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Precision of a written adapter file.
enum ggraft_precision
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Two bytes a value. Tensors with values beyond 65504 are single precision all the same.
  GGRAFT_PRECISION_F16 = 0,
  // Four bytes a value.
  GGRAFT_PRECISION_F32 = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_precision ggraft_precision;
#else
typedef int32_t ggraft_precision;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Whose kernels multiply with the weights and compute attention.
enum ggraft_kernels
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // ggraft's own where they are faster than ggml's on this CPU, by type and number of tokens.
  GGRAFT_KERNELS_AUTO = 0,
  // ggraft's own where the CPU has them.
  GGRAFT_KERNELS_OWN = 1,
  // ggml's only: the logits are llama.cpp's, bit for bit.
  GGRAFT_KERNELS_GGML = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_kernels ggraft_kernels;
#else
typedef int32_t ggraft_kernels;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Type of the KV cache.
enum ggraft_kv_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Two bytes a value.
  GGRAFT_KV_F16 = 0,
  // Four bytes a value.
  GGRAFT_KV_F32 = 1,
  // 34 bytes for 32 values; the head size must be a multiple of 32 and flash attention on.
  GGRAFT_KV_Q8_0 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_kv_type ggraft_kv_type;
#else
typedef int32_t ggraft_kv_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Whether attention runs in one fused kernel.
enum ggraft_flash_attention
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // What is faster on this CPU.
  GGRAFT_FLASH_ATTENTION_AUTO = 0,
  // Fused.
  GGRAFT_FLASH_ATTENTION_ON = 1,
  // Separate products and softmax.
  GGRAFT_FLASH_ATTENTION_OFF = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_flash_attention ggraft_flash_attention;
#else
typedef int32_t ggraft_flash_attention;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What happens to text that was computed under another adapter.
enum ggraft_existing_text
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Compute it again under the new adapter; the conversation goes on.
  GGRAFT_TEXT_RECOMPUTE = 0,
  // Forget it; the session starts empty.
  GGRAFT_TEXT_DROP = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_existing_text ggraft_existing_text;
#else
typedef int32_t ggraft_existing_text;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Why a generation ended.
enum ggraft_stop_reason
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The model ended the text.
  GGRAFT_STOP_END = 0,
  // `max_tokens` were generated.
  GGRAFT_STOP_MAX_TOKENS = 1,
  // A stop string was found.
  GGRAFT_STOP_STRING = 2,
  // The callback said so.
  GGRAFT_STOP_CALLBACK = 3,
  // The context is full; of an engine's answers, a session fails instead.
  GGRAFT_STOP_CONTEXT_FULL = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_stop_reason ggraft_stop_reason;
#else
typedef int32_t ggraft_stop_reason;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How important a log line is.
enum ggraft_log_level
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Something failed.
  GGRAFT_LOG_ERROR = 1,
  // Something is not as it should be.
  GGRAFT_LOG_WARN = 2,
  // What a user may want to know.
  GGRAFT_LOG_INFO = 3,
  // What a developer may want to know.
  GGRAFT_LOG_DEBUG = 4,
  // Everything.
  GGRAFT_LOG_TRACE = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_log_level ggraft_log_level;
#else
typedef int32_t ggraft_log_level;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Where training starts.
enum ggraft_init
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // GGRAFT_INIT_PROMPTS. But of a prefix GGRAFT_INIT_RANDOM with the MLP, the context with GGRAFT_OBJECTIVE_DISTILL, and
  // in runs of at least 300 steps in which no row is frozen GGRAFT_INIT_MEAN, or GGRAFT_INIT_RANDOM from 8 passes over the
  // training set on.
  GGRAFT_INIT_DEFAULT = 0,
  // Normally distributed values; for an encoder PyTorch's initial weights.
  GGRAFT_INIT_RANDOM = 1,
  // Zeros. Not with an encoder.
  GGRAFT_INIT_ZEROS = 2,
  // Embeddings of tokens picked at random. Not for prefixes.
  GGRAFT_INIT_VOCAB = 3,
  // `init_text`, cut or repeated to the adapter's length: the embeddings of its tokens, or for a prefix the keys and values
  // that the model computes for it.
  GGRAFT_INIT_TEXT = 4,
  // As GGRAFT_INIT_TEXT, from the first training rows.
  GGRAFT_INIT_PROMPTS = 5,
  // The rows of `init_adapter`: its training goes on.
  GGRAFT_INIT_ADAPTER = 6,
  // Keys near the mean key of the first training rows, values near zero, and noise. Prefixes only.
  GGRAFT_INIT_MEAN = 7,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_init ggraft_init;
#else
typedef int32_t ggraft_init;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// The network that produces the adapter's rows while training; it is folded away when the adapter is made.
enum ggraft_reparam
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // GGRAFT_REPARAM_MLP for P-tuning, GGRAFT_REPARAM_NONE for the others.
  GGRAFT_REPARAM_DEFAULT = 0,
  // None: the rows themselves are trained.
  GGRAFT_REPARAM_NONE = 1,
  // A multilayer perceptron, for prefixes and P-tuning.
  GGRAFT_REPARAM_MLP = 2,
  // A bidirectional LSTM and a perceptron, for P-tuning.
  GGRAFT_REPARAM_LSTM = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_reparam ggraft_reparam;
#else
typedef int32_t ggraft_reparam;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What is to be learned.
enum ggraft_objective
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The tokens that follow the prompt.
  GGRAFT_OBJECTIVE_COMPLETION = 0,
  // All tokens.
  GGRAFT_OBJECTIVE_ALL = 1,
  // What the model itself predicts for the tokens that follow the prompt when it reads `context` in front of each row: the
  // adapter will stand for that text.
  GGRAFT_OBJECTIVE_DISTILL = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_objective ggraft_objective;
#else
typedef int32_t ggraft_objective;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How the learning rate changes after the warm-up.
enum ggraft_schedule
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // It falls evenly.
  GGRAFT_SCHEDULE_LINEAR = 0,
  // It falls as half a wave of a cosine.
  GGRAFT_SCHEDULE_COSINE = 1,
  // It stays.
  GGRAFT_SCHEDULE_CONSTANT = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_schedule ggraft_schedule;
#else
typedef int32_t ggraft_schedule;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How values move against their gradient.
enum ggraft_optimizer
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // AdamW, which needs the least tuning.
  GGRAFT_OPTIMIZER_ADAMW = 0,
  // Adafactor without parameter scaling, which remembers less.
  GGRAFT_OPTIMIZER_ADAFACTOR = 1,
  // Gradient descent with momentum.
  GGRAFT_OPTIMIZER_SGD = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_optimizer ggraft_optimizer;
#else
typedef int32_t ggraft_optimizer;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Whether a run goes on.
enum ggraft_train_state
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // There are steps left.
  GGRAFT_TRAIN_RUNNING = 0,
  // All steps were taken.
  GGRAFT_TRAIN_STEPS = 1,
  // The validation loss has not improved for `patience` evaluations.
  GGRAFT_TRAIN_EARLY_STOP = 2,
  // A step ended with GGRAFT_ERROR_NON_FINITE: there is nothing to go on with. The adapter is the best one or, without
  // evaluations, the last one with a finite loss.
  GGRAFT_TRAIN_FAILED = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ggraft_train_state ggraft_train_state;
#else
typedef int32_t ggraft_train_state;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// An immutable adapter in memory. May be used by any number of threads and sessions at once.
typedef struct ggraft_adapter ggraft_adapter;

// Serves many requests at once, each with its own adapter, on a thread of its own. For any number of threads at the same time.
typedef struct ggraft_engine ggraft_engine;

// An adapter in the form that one context asked for. May be used by any thread.
typedef struct ggraft_graft ggraft_graft;

// A `llama_context` of the application's, and the base that it runs. For one thread at a time (GGRAFT_ERROR_BUSY otherwise), as the context itself.
typedef struct ggraft_host ggraft_host;

// A frozen base model, mapped from its file. May be used by any number of threads at once.
typedef struct ggraft_model ggraft_model;

// The answer to a request, as it comes. For one thread at a time, except for `ggraft_reply_cancel`, which any thread may call at any time.
typedef struct ggraft_reply ggraft_reply;

// Chooses tokens. For one thread at a time.
typedef struct ggraft_sampler ggraft_sampler;

// One text with at most one adapter, on a model that others share. For one thread at a time, except for
// `ggraft_session_cancel` and `ggraft_session_clear_cancel`, which any thread may call at any time.
typedef struct ggraft_session ggraft_session;

// Turns tokens into text piece by piece. For one thread at a time.
typedef struct ggraft_text_stream ggraft_text_stream;

// Trains one adapter on a model that others share. For one thread at a time, except for `ggraft_trainer_poll`,
// `ggraft_trainer_cancel` and `ggraft_trainer_clear_cancel`, which any thread may call at any time.
typedef struct ggraft_trainer ggraft_trainer;

// Receives a log line: a `ggraft_log_level`, the part of the library it comes from, and the text (UTF-8, NUL-terminated, both
// live until the callback returns). It is called from any thread, also from several at once. Lines that are logged by
// functions that the callback calls are dropped. No exception and no longjmp may leave it.
typedef void (*ggraft_log_callback)(int32_t level, const char *target, const char *message, void *user_data);

// How to open a model. Fill it with `ggraft_model_params_init`.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // Not 0: copy matrices into layouts for ggml's kernels, for a second copy of the weights in memory and seconds
  // at start; slower than ggraft's own with AVX-512 VNNI. Default 0: nothing is copied.
  int32_t repack;
  // Not 0: the text of control tokens ("<|im_end|>") inside messages becomes those tokens. Default 0: whoever may write a message
  // could otherwise end it, and speak for somebody else.
  int32_t parse_special;
  // Chat template instead of the file's: Jinja source, or chatml, gemma, llama2, llama3, phi3 or zephyr. NULL: the file's.
  const char *chat_template;
  // A `ggraft_kernels`. Default GGRAFT_KERNELS_AUTO.
  int32_t kernels;
  // A `ggraft_decoder`. Default GGRAFT_DECODER_OWN.
  int32_t decoder;
} ggraft_model_params;

// Facts about a model. The strings belong to the model.
typedef struct {
  // `general.architecture` of the file, for example "llama".
  const char *architecture;
  // Identifies the model whatever its quantization: 64 hexadecimal digits.
  const char *fingerprint;
  // Source of the chat template (Jinja), NULL if there is none.
  const char *chat_template;
  // Layers.
  uint32_t n_layer;
  // Embedding width.
  uint32_t n_embd;
  // Attention heads; 0 if layers differ.
  uint32_t n_head;
  // Key and value heads; 0 if layers differ.
  uint32_t n_head_kv;
  // Width of a head; 0 if layers differ.
  uint32_t head_dim;
  // Rows of the embedding table: the number of logits.
  uint32_t n_vocab;
  // Tokens of the tokenizer; 0 if the file has none, and then only functions on token ids work.
  uint32_t n_tokens;
  // Context length of the training, in tokens.
  uint32_t n_ctx_train;
  // The token that begins a text, -1 if there is none.
  int32_t bos;
  // The token that ends a text, -1 if there is none.
  int32_t eos;
  // 1 if the file asks for the beginning token in front of each text.
  int32_t add_bos;
  // 1 if the file asks for the ending token behind each text.
  int32_t add_eos;
  // Bytes of weights that were copied; 0 without `repack`.
  uint64_t repacked_bytes;
} ggraft_model_info;

// One message of a conversation.
typedef struct {
  // "system", "user" or "assistant".
  const char *role;
  // What was said.
  const char *content;
} ggraft_chat_message;

// Facts about an adapter. The strings belong to the adapter.
typedef struct {
  // Its name, NULL if it has none.
  const char *name;
  // Architecture of the base it was made for.
  const char *architecture;
  // Fingerprint of that base, NULL if unknown.
  const char *fingerprint;
  // Where the virtual tokens stand, NULL: in front of everything.
  const char *template_text;
  // A `ggraft_adapter_kind`.
  int32_t kind;
  // Number of virtual tokens.
  uint32_t length;
} ggraft_adapter_info;

// Choices of `ggraft_adapter_import`. Fill it with `ggraft_import_params_init`.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // Name of the new adapter; NULL: none.
  const char *name;
  // Which task of a multi-task adapter, from 0; required there, refused elsewhere. Default -1: none.
  int32_t task;
  // Multiplies the rows of prompt and P-tuning adapters. Default 0: rows stay as they are.
  float row_factor;
} ggraft_import_params;

// How a session computes. Fill it with `ggraft_session_params_init`.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // Positions, the adapter's included. Default 0: what the model was trained on.
  uint32_t n_ctx;
  // Threads that compute. Default 0: one for each physical core that this process may use. Sessions of one model with equal
  // counts share one pool and take turns.
  uint32_t n_threads;
  // Tokens per prefill step. Default 512.
  uint32_t n_batch;
  // A `ggraft_kv_type`. Default GGRAFT_KV_F16.
  int32_t kv_type;
  // A `ggraft_flash_attention`. Default GGRAFT_FLASH_ATTENTION_AUTO.
  int32_t flash_attention;
  // Not 0: attach adapters whose fingerprint names another base of the same shape. Default 0.
  int32_t accept_other_base;
} ggraft_session_params;

// Added to the logit of one token; -INFINITY bans it.
typedef struct {
  // The token.
  int32_t token;
  // What is added.
  float bias;
} ggraft_logit_bias;

// How the next token is chosen. Fill it with `ggraft_sampler_params_init`.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // Divides the logits; 0 takes the most likely token (greedy). Default 0.8.
  float temperature;
  // Keeps the k most likely tokens; 0 keeps all. Default 40.
  uint32_t top_k;
  // Keeps the smallest set of tokens whose probabilities reach p; 1 keeps all. Default 0.95.
  float top_p;
  // Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all. Default 0.05.
  float min_p;
  // Divides the logits (multiplies negative ones) of recent tokens; 1 does nothing. Default 1.
  float repeat_penalty;
  // How many tokens the penalties look back on; 0 switches them off. Default 64.
  uint32_t repeat_last_n;
  // Subtracted from the logit of a recent token for each time it occurred. Default 0.
  float frequency_penalty;
  // Subtracted once from the logit of a recent token. Default 0.
  float presence_penalty;
  // Equal seeds give equal tokens for equal logits. Default GGRAFT_RANDOM_SEED.
  uint32_t seed;
  // Entries of `logit_bias`. Default 0.
  uint32_t n_logit_bias;
  // Biases of single tokens; copied. Default NULL.
  const ggraft_logit_bias *logit_bias;
} ggraft_sampler_params;

// How text is generated. Fill it with `ggraft_generate_params_init`.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // How the next token is chosen. Default NULL: the defaults of `ggraft_sampler_params_init`.
  const ggraft_sampler_params *sampler;
  // Strings that end the generation; they are not shown. Default NULL.
  const char *const *stop;
  // Entries of `stop`. Default 0.
  size_t n_stop;
  // Tokens at most. Default 0: until the model ends the text or the context is full (an error).
  uint32_t max_tokens;
  // Not 0: go on behind a token that ends the text. Default 0.
  int32_t ignore_end;
} ggraft_generate_params;

// Receives generated text as soon as it is complete: UTF-8, NUL-terminated, never part of a character. `length` counts its
// bytes without the NUL; the text lives until the callback returns. Returning anything but 0 ends the generation.
//
// The session is in use while the callback runs: of its functions only `ggraft_session_cancel` works. The callback must not
// free it, and no exception and no longjmp may leave it.
typedef int32_t (*ggraft_token_callback)(const char *text, size_t length, void *user_data);

// What `ggraft_session_generate` did, or an engine.
typedef struct {
  // Tokens that were generated, one that ends the text included.
  uint64_t n_tokens;
  // Tokens that were computed one by one: usually one less than were generated, the first one comes from the prompt.
  uint64_t decode_tokens;
  // Time of those in seconds, sampling included.
  double decode_seconds;
  // A `ggraft_stop_reason`.
  int32_t reason;
} ggraft_generate_result;

// How an engine computes, and for how many. Fill it with `ggraft_engine_params_init`.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // Bytes of keys and values at most. Default 0: as much as it takes.
  uint64_t kv_bytes;
  // Bytes of them that are kept of texts that are over, for those that begin with the same under the same adapter. Default 256 MiB.
  uint64_t prefix_bytes;
  // Positions of one text, the adapter's included. Default 0: what the model was trained on.
  uint32_t n_ctx;
  // Threads that compute. Default 0: one for each physical core that this process may use.
  uint32_t n_threads;
  // Texts at most that are computed at a time. Default 64.
  uint32_t max_running;
  // Requests at most that wait. Default 1024.
  uint32_t max_waiting;
  // Tokens of prompts at most in a step that nobody waits for. Default 512.
  uint32_t n_batch;
  // The same beside texts that are being written. Default 0: as many as about double the time between their tokens.
  uint32_t n_batch_beside;
  // A `ggraft_kv_type`. Default GGRAFT_KV_F16.
  int32_t kv_type;
  // A `ggraft_flash_attention`. Default GGRAFT_FLASH_ATTENTION_AUTO.
  int32_t flash_attention;
  // Not 0: when memory is short the youngest text ends with an error, instead of waiting and being computed anew. Default 0.
  int32_t refuse_when_full;
  // Not 0: take adapters whose fingerprint names another base of the same shape. Default 0.
  int32_t accept_other_base;
} ggraft_engine_params;

// A function of llama.h, to be cast to its own type.
typedef void (*ggraft_function)(void);

// Finds a function of the application's libllama by its name in llama.h, or returns NULL; `GGRAFT_HOST_FUNCTIONS` lists all that are asked for.
typedef ggraft_function (*ggraft_find_callback)(const char *name, void *user_data);

// A part of a prompt: `n` tokens, with `rows` NULL, or `n` rows of embeddings, with `tokens` NULL. They live until the callback returns.
typedef void (*ggraft_piece_callback)(const int32_t *tokens, const float *rows, size_t n, void *user_data);

// What to train, and how. Fill it with `ggraft_train_params_init`. Texts are copied.
typedef struct {
  // Size of the struct, set by the init function.
  size_t struct_size;
  // Name of the adapter, for people. Default NULL: none.
  const char *name;
  // A `ggraft_adapter_kind`. Default GGRAFT_ADAPTER_PREFIX.
  int32_t method;
  // Virtual tokens. Default 0: what the template places, what `init_adapter` has, or 20, which is enough for most tasks.
  uint32_t length;
  // A `ggraft_init`. Default GGRAFT_INIT_DEFAULT.
  int32_t init;
  // A `ggraft_reparam`. Default GGRAFT_REPARAM_DEFAULT.
  int32_t reparam;
  // The text of GGRAFT_INIT_TEXT, which others ignore. Default NULL.
  const char *init_text;
  // The adapter of GGRAFT_INIT_ADAPTER, which others ignore; its handle may be freed. Default NULL.
  const ggraft_adapter *init_adapter;
  // Width of the encoder's hidden layers. Default 0: that of its input, as in PEFT.
  uint32_t hidden;
  // Layers of the LSTM. Default 2.
  uint32_t lstm_layers;
  // P-tuning: where the virtual tokens stand, for example "{v:10} {prompt} {v:10}". Default NULL: in front of everything.
  const char *template_text;
  // The text of GGRAFT_OBJECTIVE_DISTILL, which others ignore. Default NULL.
  const char *context;
  // A `ggraft_objective`. Default GGRAFT_OBJECTIVE_COMPLETION.
  int32_t objective;
  // GGRAFT_OBJECTIVE_DISTILL: most probable tokens that are taken over at each place. Default 20, which hold nearly all of
  // the probability.
  uint32_t top_k;
  // Rows of a prefix that stay as they begin, from the first on: 1 keeps an attention sink. Not with an encoder. Default 0.
  uint32_t freeze_first;
  // Probability that is spread over the vocabulary. Default 0.
  float label_smoothing;
  // Steps of the run. Default 0: as `epochs` says, or 300.
  uint64_t steps;
  // Passes over the training set; ignored if there are `steps`. Default 0: as `steps` says.
  double epochs;
  // Rows that are computed together. Default 8.
  uint32_t batch;
  // Batches that are added up to one step. Default 1.
  uint32_t accum;
  // Longest row in tokens, virtual ones included; longer rows are cut at the end. Default 0: the model's context.
  uint32_t max_len;
  // A `ggraft_schedule`. Default GGRAFT_SCHEDULE_LINEAR.
  int32_t schedule;
  // Learning rate at its highest. Default 0: what suits method, reparam and optimizer, 0.01 to 1.
  double lr;
  // Steps in which the learning rate rises. Default -1: one in fifteen, at most 100.
  int64_t warmup;
  // AdamW's decay of the mean of the gradient, from 0 to below 1. Default 0.9.
  double beta1;
  // AdamW's decay of the mean of the gradient's square, from 0 to below 1. Default 0.9.
  double beta2;
  // Pulls values towards 0. Default -1: what suits method, reparam, learning rate and passes over the data; 0 in most runs.
  double weight_decay;
  // Largest norm of the gradient, longer ones are scaled down to it; 0 for no limit. Default 1.
  double clip;
  // A `ggraft_optimizer`. Default GGRAFT_OPTIMIZER_ADAMW.
  int32_t optimizer;
  // Probability that a value is left out in a step. Default 0.
  float dropout;
  // Steps between two evaluations of the validation set. Default 0: 20 evaluations in a run.
  uint64_t eval_every;
  // Evaluations without improvement after which training stops. Default 0: it does not.
  uint64_t patience;
  // Equal seeds, data and thread counts give equal adapters, bit for bit. Default 1.
  uint64_t seed;
  // Bytes for what the backward pass needs of the forward pass; what does not fit is computed twice. Default 0: 800 MiB.
  uint64_t memory;
  // Threads that compute. Default 0: one for each physical core that this process may use. Trainers and sessions of one model
  // with equal counts share one pool and take turns.
  uint32_t n_threads;
  // Context length for which the adapter is meant; only models with long-context factors care. Default 0: the model's.
  uint32_t n_ctx;
  // Directions of a step by forward passes alone (MeZO), each for two of them: for bases without a backward pass, which only libllama's decoder computes. Default 0:
  // backpropagation.
  uint32_t mezo_directions;
  // Length of these two steps, as a part of the root mean square of what is trained. Default 0.1.
  float mezo_epsilon;
} ggraft_train_params;

// What a step did, and how the run stands.
typedef struct {
  // Steps taken so far.
  uint64_t step;
  // Steps of the run; 0 before the first step if the params left them open.
  uint64_t steps;
  // Tokens computed in the step, virtual ones included.
  uint64_t tokens;
  // Tokens predicted in the step.
  uint64_t targets;
  // Mean cross-entropy of those before the step, in nats. NaN before the first step, as the next three.
  double loss;
  // Learning rate of the step.
  double lr;
  // Norm of the step's gradient before clipping.
  double grad_norm;
  // Duration of the step without the evaluation.
  double seconds;
  // Mean cross-entropy of the validation set after the step; NaN if it was not evaluated.
  double valid_loss;
  // Passes over the training set so far.
  double epoch;
  // 1 if `valid_loss` is the lowest so far: `ggraft_trainer_adapter` returns the adapter of this step.
  int32_t best;
  // A `ggraft_train_state`.
  int32_t state;
} ggraft_train_report;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The message of the last function that failed on the calling thread, empty if none did. A success does not clear it. The
// string belongs to the thread and lives until the next function fails on it, or the thread ends.
const char *ggraft_last_error(void);

// The library's version, for example "0.1.0". A static string.
const char *ggraft_version(void);

// GGRAFT_ABI_VERSION of the library, to be compared with that of the header.
uint32_t ggraft_abi_version(void);

// Sends log lines up to `max_level` (a `ggraft_log_level`) to `callback`; NULL switches them off again. When it returns, the
// callback from before is not running and never called again.
//
// The first call installs the receiver for the process. If the library is part of a Rust program that has installed a
// `tracing` subscriber of its own, log lines go there and this is GGRAFT_ERROR_LOG. From inside the callback it is
// GGRAFT_ERROR_BUSY.
//
// # Safety
// `callback` may be called with `user_data` from any thread, also several at once, until the next call of this function returns.
ggraft_status ggraft_log_set(ggraft_log_callback callback,
                             void *user_data,
                             int32_t max_level);

// Fills `params` with the defaults: `ggraft_model_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_model_params_init(ggraft_model_params *params, size_t size);

// Maps the GGUF model at `path` (any part of a split one) and checks it. `params` may be NULL. On success `*out` is a model
// to be freed with `ggraft_model_free`. The file must not be changed while the model is open.
//
// # Safety
// `path` is a NUL-terminated string, `params` NULL or an initialised struct whose strings are NUL-terminated, `out` valid for a
// write.
ggraft_status ggraft_model_open(const char *path,
                                const ggraft_model_params *params,
                                ggraft_model **out);

// Frees the handle; NULL is allowed. Sessions on the model go on and keep it in memory.
//
// # Safety
// `model` is NULL or a handle from `ggraft_model_open` that no thread uses now or later.
void ggraft_model_free(ggraft_model *model);

// Stores facts about `model`: `ggraft_model_get_info(model, &info, sizeof info)`.
//
// # Safety
// `model` is a live handle, `info` valid for writes of `size` bytes. The strings live as long as the handle.
ggraft_status ggraft_model_get_info(const ggraft_model *model, ggraft_model_info *info, size_t size);

// Stores the token ids of `text` in `tokens` and their number in `*n_tokens`. If there are more than `capacity`, nothing but
// their number is stored and GGRAFT_ERROR_BUFFER returned; so `tokens = NULL, capacity = 0` asks for the size.
//
// `add_special`: not 0 adds the beginning and ending tokens that the file asks for. `parse_special`: not 0 turns the text of
// control tokens ("<|im_end|>") into those tokens; do not do this with text from strangers.
//
// # Safety
// `model` is a live handle, `text` a NUL-terminated string, `tokens` NULL or valid for writes of `capacity` ids, `n_tokens`
// valid for a write.
ggraft_status ggraft_tokenize(const ggraft_model *model,
                              const char *text,
                              int32_t add_special,
                              int32_t parse_special,
                              int32_t *tokens,
                              size_t capacity,
                              size_t *n_tokens);

// Stores the text of `tokens` in `text`, with a NUL behind it, and its length in bytes without the NUL in `*length`. If
// `capacity` is less than `*length + 1`, nothing but the length is stored and GGRAFT_ERROR_BUFFER returned. Control tokens
// have no text; U+FFFD stands for bytes that are not UTF-8.
//
// # Safety
// `model` is a live handle, `tokens` points to `n_tokens` ids, `text` is NULL or valid for writes of `capacity` bytes, `length`
// valid for a write.
ggraft_status ggraft_detokenize(const ggraft_model *model,
                                const int32_t *tokens,
                                size_t n_tokens,
                                char *text,
                                size_t capacity,
                                size_t *length);

// 1 if generation ends with this token, 0 if not, a negative status on failure.
//
// # Safety
// `model` is a live handle.
int64_t ggraft_token_is_end(const ggraft_model *model, int32_t token);

// Writes a conversation as the model's chat template does; `add_assistant`: not 0 ends the text where the answer begins. The
// buffer works as in `ggraft_detokenize`. To compute the conversation use `ggraft_tokenize_chat`: in the text alone, control
// tokens of the template and those that somebody wrote into a message look the same. A conversation that the template refuses,
// and a model without one, are errors.
//
// # Safety
// `model` is a live handle, `messages` points to `n_messages` structs of NUL-terminated strings, `text` is NULL or valid for
// writes of `capacity` bytes, `length` valid for a write.
ggraft_status ggraft_apply_chat(const ggraft_model *model,
                                const ggraft_chat_message *messages,
                                size_t n_messages,
                                int32_t add_assistant,
                                char *text,
                                size_t capacity,
                                size_t *length);

// The tokens of a conversation as the model's chat template writes it, for `ggraft_session_prompt_tokens`: without the
// beginning token that a session adds. The template's control tokens are tokens, their text inside messages stays text.
// `add_assistant` as in `ggraft_apply_chat`, the buffer works as in `ggraft_tokenize`.
//
// # Safety
// `model` is a live handle, `messages` points to `n_messages` structs of NUL-terminated strings, `tokens` is NULL or valid for
// writes of `capacity` ids, `n_tokens` valid for a write.
ggraft_status ggraft_tokenize_chat(const ggraft_model *model,
                                   const ggraft_chat_message *messages,
                                   size_t n_messages,
                                   int32_t add_assistant,
                                   int32_t *tokens,
                                   size_t capacity,
                                   size_t *n_tokens);

// Writes `adapter` as a GGUF adapter file; it appears at `path` complete or not at all. `precision` is a `ggraft_precision`.
//
// # Safety
// `adapter` is a live handle, `path` a NUL-terminated string.
ggraft_status ggraft_adapter_save(const ggraft_adapter *adapter,
                                  const char *path,
                                  int32_t precision);

// Makes one adapter of two of the same base and kind: the rows of `first`, then those of `second`. Both stay as they are.
//
// # Safety
// `first` and `second` are live handles, `out` is valid for a write.
ggraft_status ggraft_adapter_concat(const ggraft_adapter *first,
                                    const ggraft_adapter *second,
                                    ggraft_adapter **out);

// Stores facts about `adapter`: `ggraft_adapter_get_info(adapter, &info, sizeof info)`.
//
// # Safety
// `adapter` is a live handle, `info` valid for writes of `size` bytes. The strings live as long as the handle.
ggraft_status ggraft_adapter_get_info(const ggraft_adapter *adapter, ggraft_adapter_info *info, size_t size);

// Frees the handle; NULL is allowed. Sessions that hold the adapter go on and keep it in memory.
//
// # Safety
// `adapter` is NULL or a live handle that no thread uses now or later.
void ggraft_adapter_free(ggraft_adapter *adapter);

// Loads an adapter: a GGUF adapter file, or a PEFT folder that fits `model` (with no choices; see `ggraft_adapter_import`).
// For a file `model` may be NULL. Whether an adapter fits is checked when it is attached.
//
// # Safety
// `model` is NULL or a live handle, `path` a NUL-terminated string, `out` valid for a write.
ggraft_status ggraft_adapter_load(const ggraft_model *model,
                                  const char *path,
                                  ggraft_adapter **out);

// Fills `params` with the defaults: `ggraft_import_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_import_params_init(ggraft_import_params *params, size_t size);

// Imports the PEFT folder `dir` for `model`. `params` may be NULL. PEFT does not say which weights an adapter was trained on:
// the caller states that it was this model. `ggraft_adapter_save` makes a file of it.
//
// # Safety
// `model` is a live handle, `dir` a NUL-terminated string, `params` NULL or an initialised struct, `out` valid for a write.
ggraft_status ggraft_adapter_import(const ggraft_model *model,
                                    const char *dir,
                                    const ggraft_import_params *params,
                                    ggraft_adapter **out);

// Writes `adapter` as a PEFT folder `dir` for `model`, which Transformers knows as `base_name`.
//
// # Safety
// `adapter` and `model` are live handles, `dir` and `base_name` NUL-terminated strings.
ggraft_status ggraft_adapter_export(const ggraft_adapter *adapter,
                                    const ggraft_model *model,
                                    const char *dir,
                                    const char *base_name);

// Fills `params` with the defaults: `ggraft_session_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_session_params_init(ggraft_session_params *params, size_t size);

// An empty session on `model`. `params` may be NULL.
//
// # Safety
// `model` is a live handle, `params` NULL or an initialised struct, `out` valid for a write.
ggraft_status ggraft_session_new(const ggraft_model *model, const ggraft_session_params *params, ggraft_session **out);

// Frees the session; NULL is allowed.
//
// # Safety
// `session` is NULL or a live handle that no thread uses now or later, not even to cancel.
void ggraft_session_free(ggraft_session *session);

// Puts `adapter` in front of the text; GGRAFT_ERROR_STATE if one is attached already. `existing` is a `ggraft_existing_text`.
// The session holds the adapter: its handle may be freed.
//
// # Safety
// `session` and `adapter` are live handles.
ggraft_status ggraft_session_attach(ggraft_session *session,
                                    const ggraft_adapter *adapter,
                                    int32_t existing);

// Replaces the attached adapter, if any, by `adapter`, between two tokens. Otherwise as `ggraft_session_attach`.
//
// # Safety
// `session` and `adapter` are live handles.
ggraft_status ggraft_session_swap(ggraft_session *session, const ggraft_adapter *adapter, int32_t existing);

// Takes the adapter off; GGRAFT_ERROR_STATE if there is none. `existing` is a `ggraft_existing_text`.
//
// # Safety
// `session` is a live handle.
ggraft_status ggraft_session_detach(ggraft_session *session, int32_t existing);

// Tokenizes and computes a prompt. The first prompt of a session starts with the beginning token if the model wants it, and
// goes through the adapter's template if it has one. Special tokens in the text are recognised.
//
// # Safety
// `session` is a live handle, `text` a NUL-terminated string.
ggraft_status ggraft_session_prompt(ggraft_session *session,
                                    const char *text);

// As `ggraft_session_prompt`, for tokens without the beginning token.
//
// # Safety
// `session` is a live handle, `tokens` points to `n_tokens` ids.
ggraft_status ggraft_session_prompt_tokens(ggraft_session *session, const int32_t *tokens, size_t n_tokens);

// Computes exactly these tokens behind the text: nothing is added, no template applies. All of them or, on failure, none.
//
// # Safety
// `session` is a live handle, `tokens` points to `n_tokens` ids.
ggraft_status ggraft_session_feed(ggraft_session *session,
                                  const int32_t *tokens,
                                  size_t n_tokens);

// Stores where the logits of the last token are, and how many (`n_vocab`); GGRAFT_ERROR_STATE if nothing was computed yet.
// Behind `ggraft_session_generate` the last token is computed now: it was not needed until now.
// They belong to the session and live until it computes, changes its text or its adapter, or is freed.
//
// # Safety
// `session` is a live handle, `logits` and `n_logits` are valid for writes.
ggraft_status ggraft_session_logits(ggraft_session *session,
                                    const float **logits,
                                    size_t *n_logits);

// Stores the real tokens of the session's text, virtual ones left out; the buffer works as in `ggraft_tokenize`.
//
// # Safety
// `session` is a live handle, `tokens` NULL or valid for writes of `capacity` ids, `n_tokens` valid for a write.
ggraft_status ggraft_session_tokens(ggraft_session *session, int32_t *tokens, size_t capacity, size_t *n_tokens);

// Positions in use, the adapter's included; a negative status on failure.
//
// # Safety
// `session` is a live handle.
int64_t ggraft_session_n_past(ggraft_session *session);

// Positions that the session can hold; a negative status on failure.
//
// # Safety
// `session` is a live handle.
int64_t ggraft_session_n_ctx(ggraft_session *session);

// Bytes reserved for the KV cache, which become resident as the context fills; a negative status on failure.
//
// # Safety
// `session` is a live handle.
int64_t ggraft_session_kv_bytes(ggraft_session *session);

// Forgets the text; the adapter stays.
//
// # Safety
// `session` is a live handle.
ggraft_status ggraft_session_reset(ggraft_session *session);

// Stops what the session computes, and refuses what follows, with GGRAFT_ERROR_CANCELLED, until
// `ggraft_session_clear_cancel`. Any thread may call it at any time, also while another one is inside a function of the session.
//
// # Safety
// `session` is a live handle.
ggraft_status ggraft_session_cancel(ggraft_session *session);

// Allows work again after `ggraft_session_cancel`. Any thread may call it.
//
// # Safety
// `session` is a live handle.
ggraft_status ggraft_session_clear_cancel(ggraft_session *session);

// Fills `params` with the defaults: `ggraft_generate_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_generate_params_init(ggraft_generate_params *params, size_t size);

// Generates text behind a prompt. `params`, `callback` and `result` may be NULL. What was generated is part of the session's
// text, so that a conversation can go on; `ggraft_session_tokens` gives its tokens. Bytes at its end that are only the beginning of
// a character are in the tokens and not in the text; a next call that goes on from there shows the character. Pass
// `sizeof *result` as `result_size`.
//
// # Safety
// `session` is a live handle, `params` NULL or an initialised struct whose pointers are valid, `result` NULL or valid for
// writes of `result_size` bytes; `callback` may be called with `user_data` until this function returns.
ggraft_status ggraft_session_generate(ggraft_session *session,
                                      const ggraft_generate_params *params,
                                      ggraft_token_callback callback,
                                      void *user_data,
                                      ggraft_generate_result *result,
                                      size_t result_size);

// Takes back the end of the text: of `ggraft_session_tokens` the first `n_tokens` stay, with what was computed of them; with that many or
// fewer nothing happens. The last turn of a chat is taken back by the number of tokens there were before it. What an adapter's
// template puts behind the first prompt, and the text of models with a sliding window, may have to be computed anew; if that
// fails, the session is as it was.
//
// # Safety
// `session` is a live handle.
ggraft_status ggraft_session_truncate(ggraft_session *session,
                                      size_t n_tokens);

// Writes the text and what was computed of it to a file: a session of another process goes on with it without computing it
// again (`ggraft_session_load`). `note` is for the application, which gets it back, the messages of a conversation for
// example; NULL for none, at most 16 MiB. The file is replaced when the new one is complete.
//
// # Safety
// `session` is a live handle, `path` a NUL-terminated string, `note` NULL or one.
ggraft_status ggraft_session_save(ggraft_session *session,
                                  const char *path,
                                  const char *note);

// Goes on with the text of a file that `ggraft_session_save` wrote, in place of the session's own. The model, the attached adapter and the
// type of the KV cache must be those it was saved with; the context may be another if the text fits. On failure
// (GGRAFT_ERROR_SAVED if the file is damaged or belongs to another session) the session is as it was.
//
// `note` may be NULL; otherwise `*note` becomes the note, which is empty if there was none. It belongs to the session and lives until its
// next load, or until the session is freed.
//
// # Safety
// `session` is a live handle, `path` a NUL-terminated string, `note` NULL or valid for a write.
ggraft_status ggraft_session_load(ggraft_session *session,
                                  const char *path,
                                  const char **note);

// Fills `params` with the defaults: `ggraft_engine_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_engine_params_init(ggraft_engine_params *params, size_t size);

// An engine on `model`, with a thread of its own. `params` may be NULL.
//
// # Safety
// `model` is a live handle, `params` NULL or an initialised struct, `out` valid for a write.
ggraft_status ggraft_engine_new(const ggraft_model *model, const ggraft_engine_params *params, ggraft_engine **out);

// Frees the engine; NULL is allowed. Requests that are not over end with GGRAFT_ERROR_STATE; replies stay until they are freed.
//
// # Safety
// `engine` is NULL or a live handle that no thread uses now or later.
void ggraft_engine_free(ggraft_engine *engine);

// Takes a request to complete `prompt` behind `adapter` (NULL: none), and returns at once. `params` may be NULL. Who waits with a higher `priority` begins first.
// The engine holds the adapter: its handle may be freed. GGRAFT_ERROR_BUSY if as many wait as may; what is wrong with the request itself is said here, too.
//
// # Safety
// `engine` is a live handle, `prompt` a NUL-terminated string, `adapter` NULL or a live handle, `params` NULL or an initialised struct whose pointers are
// valid, `out` valid for a write.
ggraft_status ggraft_engine_submit(const ggraft_engine *engine,
                                   const char *prompt,
                                   const ggraft_adapter *adapter,
                                   const ggraft_generate_params *params,
                                   int32_t priority,
                                   ggraft_reply **out);

// As `ggraft_engine_submit`, for `n_adapters` members that speak as one: they get the same tokens, in the same steps, and each token comes from what they say together. A NULL
// among `adapters` is the model without one. `weights` has as many elements, or is NULL: all the same. `combine` is a `ggraft_combine`.
//
// # Safety
// As for `ggraft_engine_submit`; `adapters` has `n_adapters` elements, each NULL or a live handle, and so has `weights` unless it is NULL.
ggraft_status ggraft_engine_submit_ensemble(const ggraft_engine *engine,
                                            const char *prompt,
                                            const ggraft_adapter *const *adapters,
                                            const float *weights,
                                            size_t n_adapters,
                                            int32_t combine,
                                            const ggraft_generate_params *params,
                                            int32_t priority,
                                            ggraft_reply **out);

// Shows what has come of the answer since the last call, without waiting. `*done` becomes not 0 when it is over, and `result` is filled then; a request that failed
// gives its error once. After that, GGRAFT_ERROR_STATE. Otherwise as `ggraft_reply_wait`.
//
// # Safety
// As for `ggraft_reply_wait`; `done` is valid for a write.
ggraft_status ggraft_reply_poll(ggraft_reply *reply,
                                ggraft_token_callback callback,
                                void *user_data,
                                int32_t *done,
                                ggraft_generate_result *result,
                                size_t result_size);

// Waits for all of the answer. `callback` gets its text as it comes, and ends it by returning anything but 0; it and `result` may be NULL. Pass `sizeof *result` as
// `result_size`.
//
// # Safety
// `reply` is a live handle, `result` NULL or valid for writes of `result_size` bytes; `callback` may be called with `user_data` until this function returns.
ggraft_status ggraft_reply_wait(ggraft_reply *reply,
                                ggraft_token_callback callback,
                                void *user_data,
                                ggraft_generate_result *result,
                                size_t result_size);

// Ends the request as soon as the step that is being computed is over: `ggraft_reply_wait` returns GGRAFT_ERROR_CANCELLED. Any thread may call it.
//
// # Safety
// `reply` is a live handle.
ggraft_status ggraft_reply_cancel(ggraft_reply *reply);

// Frees the reply; NULL is allowed. A request that is not over is cancelled.
//
// # Safety
// `reply` is NULL or a live handle that no thread uses now or later, not even to cancel.
void ggraft_reply_free(ggraft_reply *reply);

// Fills `params` with the defaults: `ggraft_sampler_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_sampler_params_init(ggraft_sampler_params *params, size_t size);

// A sampler for logits of `model`. `params` may be NULL.
//
// # Safety
// `model` is a live handle, `params` NULL or an initialised struct, `out` valid for a write.
ggraft_status ggraft_sampler_new(const ggraft_model *model, const ggraft_sampler_params *params, ggraft_sampler **out);

// Chooses a token for a row of `n_logits` logits, such as `ggraft_session_logits` gives. Then call `ggraft_sampler_accept`
// with the token that is really used.
//
// # Safety
// `sampler` is a live handle, `logits` points to `n_logits` numbers, `token` is valid for a write.
ggraft_status ggraft_sampler_sample(ggraft_sampler *sampler,
                                    const float *logits,
                                    size_t n_logits,
                                    int32_t *token);

// Tells the penalties that `token` is now part of the text: chosen tokens, and those of the prompt where they should count.
//
// # Safety
// `sampler` is a live handle.
ggraft_status ggraft_sampler_accept(ggraft_sampler *sampler,
                                    int32_t token);

// Forgets the text and starts the random numbers anew from the seed.
//
// # Safety
// `sampler` is a live handle.
ggraft_status ggraft_sampler_reset(ggraft_sampler *sampler);

// Frees the sampler; NULL is allowed.
//
// # Safety
// `sampler` is NULL or a live handle that no thread uses now or later.
void ggraft_sampler_free(ggraft_sampler *sampler);

// A stream for tokens of `model`.
//
// # Safety
// `model` is a live handle, `out` valid for a write.
ggraft_status ggraft_text_stream_new(const ggraft_model *model, ggraft_text_stream **out);

// Takes the next token. `*text` becomes the text that is complete now (UTF-8, NUL-terminated, possibly empty), `*length` its
// bytes without the NUL. The text belongs to the stream and lives until its next call.
//
// # Safety
// `stream` is a live handle, `text` and `length` are valid for writes.
ggraft_status ggraft_text_stream_push(ggraft_text_stream *stream,
                                      int32_t token,
                                      const char **text,
                                      size_t *length);

// Ends the text: U+FFFD if its last character is incomplete, else nothing. The stream can be used again for another text.
//
// # Safety
// As `ggraft_text_stream_push`.
ggraft_status ggraft_text_stream_finish(ggraft_text_stream *stream,
                                        const char **text,
                                        size_t *length);

// Frees the stream; NULL is allowed.
//
// # Safety
// `stream` is NULL or a live handle that no thread uses now or later.
void ggraft_text_stream_free(ggraft_text_stream *stream);

// Makes a host of the application's `ctx`, a `struct llama_context *`, which runs the model file `base`. Its functions are found by `find`; with NULL by the dynamic linker, if
// the process has them as a shared library. To see how the context keeps keys and values one token is decoded into the sequence `seq`, which must be empty, and taken out
// again. The context must live as long as the host is used, but for `ggraft_host_free`, and no other thread may use it during a call.
//
// # Safety
// `find` returns the functions that it is asked for, or NULL, `ctx` is NULL or a live context of their library, `base` a NUL-terminated string, `out` valid for a write.
ggraft_status ggraft_host_new(ggraft_find_callback find,
                              void *user_data,
                              void *ctx,
                              const char *base,
                              int32_t seq,
                              ggraft_host **out);

// Frees the handle; NULL is allowed. Neither the context nor what was attached to it is touched.
//
// # Safety
// `host` is NULL or a live handle that no thread uses now or later.
void ggraft_host_free(ggraft_host *host);

// Loads an adapter: a GGUF adapter file, or a PEFT folder for the host's base. `ggraft_adapter_free` frees it.
//
// # Safety
// `host` is a live handle, `path` a NUL-terminated string, `out` valid for a write.
ggraft_status ggraft_host_load(const ggraft_host *host, const char *path, ggraft_adapter **out);

// Prepares an adapter for the host's context: once, to be attached often. Virtual tokens are decoded into the sequence `seq`, which must be empty, and taken out again; a
// prefix does not need it. One whose template places virtual tokens among the text is refused: that is what `ggraft_host_prompt` is for.
//
// # Safety
// `host` and `adapter` are live handles, `out` is valid for a write.
ggraft_status ggraft_host_prepare(ggraft_host *host,
                                  const ggraft_adapter *adapter,
                                  int32_t seq,
                                  ggraft_graft **out);

// Positions that a prepared adapter takes, or a negative `ggraft_status`.
//
// # Safety
// `graft` is a live handle.
int64_t ggraft_graft_length(const ggraft_graft *graft);

// Frees the handle; NULL is allowed. Sequences that it is attached to keep it.
//
// # Safety
// `graft` is NULL or a live handle that no thread uses now or later.
void ggraft_graft_free(ggraft_graft *graft);

// Puts a prepared adapter at the beginning of the sequence `seq`, which must be empty. Returns the position of the first token behind it, or a negative `ggraft_status`.
//
// # Safety
// `host` and `graft` are live handles.
int64_t ggraft_host_attach(ggraft_host *host,
                           const ggraft_graft *graft,
                           int32_t seq);

// As `ggraft_host_attach`, in place of what `seq` has, text and all.
//
// # Safety
// As for `ggraft_host_attach`.
int64_t ggraft_host_swap(ggraft_host *host, const ggraft_graft *graft, int32_t seq);

// As `ggraft_host_swap`, and decodes `tokens` behind the adapter, so that the text goes on under it. Returns the position behind them, or a negative `ggraft_status`; the
// context's logits are those of the last one.
//
// # Safety
// As for `ggraft_host_attach`; `tokens` has `n` elements.
int64_t ggraft_host_swap_and_recompute(ggraft_host *host,
                                       const ggraft_graft *graft,
                                       int32_t seq,
                                       const int32_t *tokens,
                                       size_t n);

// Empties the sequence `seq`.
//
// # Safety
// `host` is a live handle.
ggraft_status ggraft_host_detach(ggraft_host *host, int32_t seq);

// Lets the sequence `to`, which must be empty, begin with all that `from` has: cells are shared where the context has one cache for all sequences, and copied elsewhere.
//
// # Safety
// `host` is a live handle.
ggraft_status ggraft_host_copy(ggraft_host *host,
                               int32_t from,
                               int32_t to);

// Steers all of the context's sequences from the next decode on by a control vector in llama.cpp's file at `path`, `strength` times as far, in the layers from `first` to `last`
// (GGRAFT_LAST_LAYER: to the end) that it has directions for. A context has one: the last takes the place of the one before, and `path` NULL takes it off. The one function of
// llama.h that `GGRAFT_HOST_FUNCTIONS` does not list is needed for it, `llama_set_adapter_cvec`, which not all versions have under this name.
//
// # Safety
// `host` is a live handle, `path` is NULL or a NUL-terminated string.
ggraft_status ggraft_host_steer(ggraft_host *host,
                                const char *path,
                                float strength,
                                uint32_t first,
                                uint32_t last);

// Decodes a prompt of `n` tokens, without BOS, into the empty sequence `seq`, with the adapter's virtual tokens where its template places them. Returns the position behind
// it, or a negative `ggraft_status`; the context's logits are those of the last token or row.
//
// # Safety
// `host` and `adapter` are live handles, `tokens` has `n` elements.
int64_t ggraft_host_prompt(ggraft_host *host,
                           const ggraft_adapter *adapter,
                           const int32_t *tokens,
                           size_t n,
                           int32_t seq);

// As `ggraft_host_prompt`, but hands out the parts of the prompt, in order, for batches of the application's own: tokens, and rows as `embd` of a batch takes them.
//
// # Safety
// As for `ggraft_host_prompt`; `callback` may be called with `user_data`.
ggraft_status ggraft_host_compose(ggraft_host *host,
                                  const ggraft_adapter *adapter,
                                  const int32_t *tokens,
                                  size_t n,
                                  ggraft_piece_callback callback,
                                  void *user_data);

// Fills `params` with the defaults: `ggraft_train_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_train_params_init(ggraft_train_params *params, size_t size);

// Prepares a run on `model`, which stays as it is: no step is taken yet. `params` may be NULL. `train` is the path of a JSONL
// file, whose rows are learned: each line an object with `prompt` and `completion`, with `messages` of `role` and `content`, or
// with `text`, and perhaps a `weight`. `valid` is such a file, too, whose rows decide which step's adapter is kept; NULL: that
// of the last step. Both are read before the function returns. To compute the initial rows can take as long as a step.
//
// # Safety
// `model` is a live handle, `params` NULL or an initialised struct whose pointers are valid, `train` a NUL-terminated string,
// `valid` NULL or one, `out` valid for a write.
ggraft_status ggraft_trainer_new(const ggraft_model *model,
                                 const ggraft_train_params *params,
                                 const char *train,
                                 const char *valid,
                                 ggraft_trainer **out);

// As `ggraft_trainer_new`, with the rows themselves in `train` and `valid` instead of paths: private data need not touch a disk.
//
// # Safety
// As `ggraft_trainer_new`.
ggraft_status ggraft_trainer_new_from_jsonl_text(const ggraft_model *model,
                                                 const ggraft_train_params *params,
                                                 const char *train,
                                                 const char *valid,
                                                 ggraft_trainer **out);

// Goes on with the run that `ggraft_trainer_save_checkpoint` wrote to `checkpoint`, with the same model and the same data
// (GGRAFT_ERROR_CHECKPOINT otherwise): the adapter will be that of a run that was never interrupted, bit for bit.
//
// # Safety
// `model` is a live handle, `checkpoint` and `train` are NUL-terminated strings, `valid` is NULL or one, `out` is valid for a
// write.
ggraft_status ggraft_trainer_resume(const ggraft_model *model,
                                    const char *checkpoint,
                                    const char *train,
                                    const char *valid,
                                    ggraft_trainer **out);

// As `ggraft_trainer_resume`, with the rows themselves in `train` and `valid`. `checkpoint` is a path all the same: a checkpoint
// holds no rows, but the `context` of GGRAFT_OBJECTIVE_DISTILL.
//
// # Safety
// As `ggraft_trainer_resume`.
ggraft_status ggraft_trainer_resume_from_jsonl_text(const ggraft_model *model,
                                                    const char *checkpoint,
                                                    const char *train,
                                                    const char *valid,
                                                    ggraft_trainer **out);

// Takes one step, and stores what it did: `ggraft_trainer_step(trainer, &report, sizeof report)`. `report.state` tells whether
// there are more; when the run is over, nothing is computed and the last report stored again. Before its first step a run with
// GGRAFT_OBJECTIVE_DISTILL computes what `context` makes the model predict in all rows.
//
// GGRAFT_ERROR_CANCELLED: the step was not taken, or only its evaluation is missing; the next call takes up what was left.
// GGRAFT_ERROR_NON_FINITE: the run is over (GGRAFT_TRAIN_FAILED), a lower learning rate may help.
//
// # Safety
// `trainer` is a live handle, `report` valid for writes of `size` bytes.
ggraft_status ggraft_trainer_step(ggraft_trainer *trainer,
                                  ggraft_train_report *report,
                                  size_t size);

// Makes the run one of `steps` steps in all, also one that is over: what was learned and the optimizer's memory stay, and the
// learning rate follows the schedule of a run of that length.
//
// # Safety
// `trainer` is a live handle.
ggraft_status ggraft_trainer_set_steps(ggraft_trainer *trainer,
                                       uint64_t steps);

// Stores the validation loss of the model without an adapter, which one must stay below to be of use; NaN without validation
// rows. Computed once in a run.
//
// # Safety
// `trainer` is a live handle, `loss` valid for a write.
ggraft_status ggraft_trainer_base_valid_loss(ggraft_trainer *trainer,
                                             double *loss);

// Stores the last report, and computes nothing: `ggraft_trainer_poll(trainer, &report, sizeof report)`. Any thread may call it
// at any time, also while another one is inside a function of the trainer.
//
// # Safety
// `trainer` is a live handle, `report` valid for writes of `size` bytes.
ggraft_status ggraft_trainer_poll(ggraft_trainer *trainer,
                                  ggraft_train_report *report,
                                  size_t size);

// Stops the step that runs, and refuses those that follow, with GGRAFT_ERROR_CANCELLED, until `ggraft_trainer_clear_cancel`. Any
// thread may call it at any time, also while another one is inside a function of the trainer.
//
// # Safety
// `trainer` is a live handle.
ggraft_status ggraft_trainer_cancel(ggraft_trainer *trainer);

// Allows steps again after `ggraft_trainer_cancel`. Any thread may call it.
//
// # Safety
// `trainer` is a live handle.
ggraft_status ggraft_trainer_clear_cancel(ggraft_trainer *trainer);

// Makes an adapter of what was learned so far: that of the lowest validation loss, or without a validation set the latest. The
// run can go on, the adapter stays as it is.
//
// # Safety
// `trainer` is a live handle, `out` valid for a write.
ggraft_status ggraft_trainer_adapter(ggraft_trainer *trainer,
                                     ggraft_adapter **out);

// Writes the adapter of `ggraft_trainer_adapter` as a GGUF adapter file in half precision, which is what the KV cache makes of
// it anyway; it appears at `path` complete or not at all.
//
// # Safety
// `trainer` is a live handle, `path` a NUL-terminated string.
ggraft_status ggraft_trainer_save(ggraft_trainer *trainer,
                                  const char *path);

// Writes everything that the next step depends on, for `ggraft_trainer_resume`; the file appears at `path` complete or not at
// all.
//
// # Safety
// `trainer` is a live handle, `path` a NUL-terminated string.
ggraft_status ggraft_trainer_save_checkpoint(ggraft_trainer *trainer,
                                             const char *path);

// Frees the trainer; NULL is allowed. Adapters that it made stay.
//
// # Safety
// `trainer` is NULL or a live handle that no thread uses now or later, not even to poll or to cancel.
void ggraft_trainer_free(ggraft_trainer *trainer);

// Fills `params` with the defaults: `ggraft_train_params_init(&params, sizeof params)`.
//
// # Safety
// `params` is NULL (an error) or valid for writes of `size` bytes.
ggraft_status ggraft_train_params_init(ggraft_train_params *params, size_t size);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GGRAFT_H */
