/* Trains an adapter in idle time: step by step, put aside and taken up again, then generates with it.
 *
 *     train MODEL.gguf TRAIN.jsonl OUT.gguf [PROMPT]
 *
 * How to compile: docs/C_API.md.
 */
#include "ggraft.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEPS 24
#define PAUSE 12
#define ANSWER_TOKENS 24

/* Stops the program when a function fails. */
static void check(ggraft_status status, const char *what)
{
    if (status != GGRAFT_OK) {
        fprintf(stderr, "error: %s: %s\n", what, ggraft_last_error());
        exit(EXIT_FAILURE);
    }
}

/* Steps until the run or the idle time is over. An application asks after each step whether it has something better to do; to
 * stop within a step, another thread calls ggraft_trainer_cancel, and to show progress ggraft_trainer_poll. */
static void train(ggraft_trainer *trainer, unsigned long pause)
{
    ggraft_train_report report;
    do {
        check(ggraft_trainer_step(trainer, &report, sizeof report), "step");
        fprintf(stderr, "step %lu/%lu: loss %.4f, %.0f tokens/s\n", (unsigned long)report.step, (unsigned long)report.steps,
                report.loss, (double)report.tokens / (report.seconds > 0 ? report.seconds : 1e-9));
    } while (report.state == GGRAFT_TRAIN_RUNNING && report.step < pause);
}

/* The answer is one line. */
static int32_t show(const char *text, size_t length, void *user_data)
{
    (void)user_data;
    fputs(text, stdout);
    return length > 0 && text[length - 1] == '\n';
}

static void answer(ggraft_session *session, const char *prompt, const char *label)
{
    ggraft_sampler_params greedy;
    ggraft_generate_params params;

    check(ggraft_sampler_params_init(&greedy, sizeof greedy), "sampler params");
    greedy.temperature = 0.0f;
    check(ggraft_generate_params_init(&params, sizeof params), "generate params");
    params.sampler = &greedy;
    params.max_tokens = ANSWER_TOKENS;

    check(ggraft_session_prompt(session, prompt), "prompt");
    printf("[%s] ", label);
    check(ggraft_session_generate(session, &params, show, NULL, NULL, 0), "generate");
    printf("\n");
}

int main(int argc, char **argv)
{
    const char *out, *prompt;
    char *checkpoint;
    ggraft_model *model;
    ggraft_train_params params;
    ggraft_trainer *trainer;
    ggraft_adapter *adapter;
    ggraft_session_params session_params;
    ggraft_session *session;

    if (argc < 4 || argc > 5) {
        fprintf(stderr, "usage: %s MODEL.gguf TRAIN.jsonl OUT.gguf [PROMPT]\n", argv[0]);
        return 2;
    }
    out = argv[3];
    prompt = argc == 5 ? argv[4] : "There is no rope left in the market.\n";
    checkpoint = malloc(strlen(out) + sizeof ".ckpt");
    if (checkpoint == NULL) {
        fprintf(stderr, "error: no memory\n");
        return EXIT_FAILURE;
    }
    strcpy(checkpoint, out);
    strcat(checkpoint, ".ckpt");

    check(ggraft_model_open(argv[1], NULL, &model), "open");

    check(ggraft_train_params_init(&params, sizeof params), "train params");
    params.method = GGRAFT_ADAPTER_PREFIX;
    params.length = 8; /* short, and few rows a step: seconds on a small model */
    params.batch = 4;
    params.steps = STEPS;
    params.name = "trained in C";
    params.n_threads = 2; /* of a machine that shall stay usable; 0 takes one for each core */
    check(ggraft_trainer_new(model, &params, argv[2], NULL, &trainer), argv[2]);

    /* The idle time is over: the run goes into a file, and the memory is free again. */
    train(trainer, PAUSE);
    check(ggraft_trainer_save_checkpoint(trainer, checkpoint), checkpoint);
    ggraft_trainer_free(trainer);

    /* Perhaps in another process, on another day: the result is that of a run without a pause. */
    check(ggraft_trainer_resume(model, checkpoint, argv[2], NULL, &trainer), checkpoint);
    train(trainer, STEPS);
    check(ggraft_trainer_save(trainer, out), out);
    check(ggraft_trainer_adapter(trainer, &adapter), "adapter");
    ggraft_trainer_free(trainer);
    remove(checkpoint);
    free(checkpoint);

    /* The same prompt without the adapter and with it. */
    check(ggraft_session_params_init(&session_params, sizeof session_params), "session params");
    session_params.n_ctx = 256;
    session_params.n_threads = 1;
    check(ggraft_session_new(model, &session_params, &session), "session");
    answer(session, prompt, "base");
    check(ggraft_session_reset(session), "reset");
    check(ggraft_session_attach(session, adapter, GGRAFT_TEXT_DROP), "attach");
    answer(session, prompt, "adapter");

    ggraft_session_free(session);
    ggraft_adapter_free(adapter);
    ggraft_model_free(model);
    fflush(stdout);
    return EXIT_SUCCESS;
}
