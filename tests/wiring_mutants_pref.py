"""Wiring faults of sft.py, reward_model.py and dpo.py, one line each, and the test that sees it.

Each says in words what is wrong. A run of the test must fail in a copy of the repository with the patch applied.
"""

MUTANTS = {  # what is wrong: (file, text, broken text, test)
    "sft.py: --seed is ignored in the order of the rows": (
        "sft.py", "permutation(len(packs), args.seed, epoch)",
        "permutation(len(packs), 1, epoch)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: every epoch has the first one's order": (
        "sft.py", "permutation(len(packs), args.seed, epoch)",
        "permutation(len(packs), args.seed, 0)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --weight_decay is ignored": (
        "sft.py", "eps=args.adam_eps, weight_decay=args.weight_decay)",
        "eps=args.adam_eps)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --adam_eps is ignored": (
        "sft.py", "eps=args.adam_eps, weight_decay=args.weight_decay)",
        "weight_decay=args.weight_decay)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the learning rate is that of the next step": (
        "sft.py", "(step - 1, total_steps, warmup_steps, args.lr)",
        "(step, total_steps, warmup_steps, args.lr)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the step whose rate is logged is another one": (
        "sft.py", "\"train/lr\": lr",
        "\"train/lr\": args.lr",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --gradient_checkpointing is ignored": (
        "sft.py", "        model.gradient_checkpointing_enable()",
        "        pass",
        "tests/test_sft_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "sft.py: --timeout_minutes is ignored": (
        "sft.py", "init_distributed(args.timeout_minutes)",
        "init_distributed()",
        "tests/test_sft_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "sft.py: evaluations come at the end alone": (
        "sft.py", "step % args.eval_every == 0 or step == total_steps",
        "step == total_steps",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the last step is not evaluated apart": (
        "sft.py", "step % args.eval_every == 0 or step == total_steps",
        "step % args.eval_every == 0",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the last step is not logged apart": (
        "sft.py", "step % args.log_every == 0 or step == total_steps",
        "step % args.log_every == 0",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: checkpoints come with the evaluations": (
        "sft.py", "step % args.save_every == 0",
        "step % args.eval_every == 0",
        "tests/test_sft_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "sft.py: a checkpoint is written at the last step too": (
        "sft.py", "== 0) and step < total_steps",
        "== 0)",
        "tests/test_sft_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "sft.py: an epoch leaves out its last batch": (
        "sft.py", "math.ceil(len(packs) / args.batch_size)",
        "len(packs) // args.batch_size",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --epochs is ignored": (
        "sft.py", "total_steps = args.epochs * steps_per_epoch",
        "total_steps = Args.epochs * steps_per_epoch",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the card names the held-out file": (
        "sft.py", "args.model, args.train_data, [",
        "args.model, str(args.eval_data), [",
        "tests/test_sft_whole.py::test_summary_and_card_say_what_the_run_did"),
    "sft.py: train/epoch is a whole number": (
        "sft.py", "step / steps_per_epoch",
        "1 + epoch",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: before is after in the summary": (
        "sft.py", "\"before\": state[\"before\"], \"after\": after",
        "\"before\": after, \"after\": after",
        "tests/test_sft_whole.py::test_summary_and_card_say_what_the_run_did"),
    "sft.py: --max_prompt_length is ignored": (
        "sft.py", "tokenizer, args.max_prompt_length)\n",
        "tokenizer)\n",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: a micro-batch is fed in another size, gradients of its own mean": (
        "sft.py", "* world_size())",
        "* len(batch) / 4 * world_size())",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --seed is ignored in the order of the rows": (
        "reward_model.py", "permutation(len(train), args.seed, epoch)",
        "permutation(len(train), 1, epoch)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: every epoch has the first one's order": (
        "reward_model.py", "permutation(len(train), args.seed, epoch)",
        "permutation(len(train), args.seed, 0)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --weight_decay is ignored": (
        "reward_model.py", "eps=args.adam_eps, weight_decay=args.weight_decay)",
        "eps=args.adam_eps)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --adam_eps is ignored": (
        "reward_model.py", "eps=args.adam_eps, weight_decay=args.weight_decay)",
        "weight_decay=args.weight_decay)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the learning rate is that of the next step": (
        "reward_model.py", "(step - 1, total_steps, warmup_steps, args.lr)",
        "(step, total_steps, warmup_steps, args.lr)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the step whose rate is logged is another one": (
        "reward_model.py", "\"train/lr\": lr",
        "\"train/lr\": args.lr",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --gradient_checkpointing is ignored": (
        "reward_model.py", "        model.gradient_checkpointing_enable()",
        "        pass",
        "tests/test_reward_model_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "reward_model.py: --timeout_minutes is ignored": (
        "reward_model.py", "init_distributed(args.timeout_minutes)",
        "init_distributed()",
        "tests/test_reward_model_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "reward_model.py: evaluations come at the end alone": (
        "reward_model.py", "step % args.eval_every == 0 or step == total_steps",
        "step == total_steps",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the last step is not evaluated apart": (
        "reward_model.py", "step % args.eval_every == 0 or step == total_steps",
        "step % args.eval_every == 0",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the last step is not logged apart": (
        "reward_model.py", "step % args.log_every == 0 or step == total_steps",
        "step % args.log_every == 0",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: checkpoints come with the evaluations": (
        "reward_model.py", "step % args.save_every == 0",
        "step % args.eval_every == 0",
        "tests/test_reward_model_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "reward_model.py: no checkpoint before the normalisation": (
        "reward_model.py", "% args.save_every == 0 or step == total_steps:",
        "% args.save_every == 0:",
        "tests/test_reliability.py::test_sigterm_while_the_reward_model_only_scores"),
    "reward_model.py: an epoch leaves out its last batch": (
        "reward_model.py", "math.ceil(len(train) / args.batch_size)",
        "len(train) // args.batch_size",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --epochs is ignored": (
        "reward_model.py", "total_steps = args.epochs * steps_per_epoch",
        "total_steps = Args.epochs * steps_per_epoch",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the card names the held-out file": (
        "reward_model.py", "args.model, args.train_data, [",
        "args.model, str(args.eval_data), [",
        "tests/test_reward_model_whole.py::test_summary_and_card_say_what_the_run_did"),
    "reward_model.py: train/epoch is a whole number": (
        "reward_model.py", "step / steps_per_epoch",
        "1 + epoch",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: before is after in the summary": (
        "reward_model.py", "\"before\": state[\"before\"], \"after\"",
        "\"before\": state[\"after\"], \"after\"",
        "tests/test_reward_model_whole.py::test_summary_and_card_say_what_the_run_did"),
    "reward_model.py: --max_prompt_length is ignored": (
        "reward_model.py", "(\"prompt\", \"chosen\", \"rejected\")], tokenizer, args.max_prompt_length)",
        "(\"prompt\", \"chosen\", \"rejected\")], tokenizer)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: a micro-batch is fed in another size, gradients of its own mean": (
        "reward_model.py", "* world_size())",
        "* len(batch) / 4 * world_size())",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --seed is ignored in the order of the rows": (
        "dpo.py", "permutation(len(train), args.seed, epoch)",
        "permutation(len(train), 1, epoch)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: every epoch has the first one's order": (
        "dpo.py", "permutation(len(train), args.seed, epoch)",
        "permutation(len(train), args.seed, 0)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --weight_decay is ignored": (
        "dpo.py", "eps=args.adam_eps, weight_decay=args.weight_decay)",
        "eps=args.adam_eps)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --adam_eps is ignored": (
        "dpo.py", "eps=args.adam_eps, weight_decay=args.weight_decay)",
        "weight_decay=args.weight_decay)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the learning rate is that of the next step": (
        "dpo.py", "(step - 1, total_steps, warmup_steps, args.lr)",
        "(step, total_steps, warmup_steps, args.lr)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the step whose rate is logged is another one": (
        "dpo.py", "\"train/lr\": lr",
        "\"train/lr\": args.lr",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --gradient_checkpointing is ignored": (
        "dpo.py", "        model.gradient_checkpointing_enable()",
        "        pass",
        "tests/test_dpo_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "dpo.py: --timeout_minutes is ignored": (
        "dpo.py", "init_distributed(args.timeout_minutes)",
        "init_distributed()",
        "tests/test_dpo_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "dpo.py: evaluations come at the end alone": (
        "dpo.py", "step % args.eval_every == 0 or step == total_steps",
        "step == total_steps",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the last step is not evaluated apart": (
        "dpo.py", "step % args.eval_every == 0 or step == total_steps",
        "step % args.eval_every == 0",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the last step is not logged apart": (
        "dpo.py", "step % args.log_every == 0 or step == total_steps",
        "step % args.log_every == 0",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: checkpoints come with the evaluations": (
        "dpo.py", "step % args.save_every == 0",
        "step % args.eval_every == 0",
        "tests/test_dpo_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "dpo.py: a checkpoint is written at the last step too": (
        "dpo.py", "== 0) and step < total_steps",
        "== 0)",
        "tests/test_dpo_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "dpo.py: an epoch leaves out its last batch": (
        "dpo.py", "math.ceil(len(train) / args.batch_size)",
        "len(train) // args.batch_size",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --epochs is ignored": (
        "dpo.py", "total_steps = args.epochs * steps_per_epoch",
        "total_steps = Args.epochs * steps_per_epoch",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the card names the held-out file": (
        "dpo.py", "args.model, args.train_data, [",
        "args.model, str(args.eval_data), [",
        "tests/test_dpo_whole.py::test_summary_and_card_say_what_the_run_did"),
    "dpo.py: train/epoch is a whole number": (
        "dpo.py", "step / steps_per_epoch",
        "1 + epoch",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: before is after in the summary": (
        "dpo.py", "\"before\": state[\"before\"], \"after\": after",
        "\"before\": after, \"after\": after",
        "tests/test_dpo_whole.py::test_summary_and_card_say_what_the_run_did"),
    "dpo.py: a micro-batch is fed in another size, gradients of its own mean": (
        "dpo.py", "* world_size())",
        "* len(batch) / 4 * world_size())",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: held-out rows are trained on": (
        "sft.py", "train, held_out = hold_out(",
        "_, held_out = hold_out(",
        "tests/test_companions.py::test_sft_trains_on_no_held_out_row"),
    "sft.py: a large model gets the default rate": (
        "sft.py", "check_rate(args, \"sft\", model)",
        "pass",
        "tests/test_companions.py::test_a_default_rate_does_not_reach_a_large_model"),
    "sft.py: held-out rows of the embedded task stay with own data": (
        "sft.py", "eval_data=None",
        "local_rank=None",
        "tests/test_companions.py::test_own_data_leave_nothing_of_the_embedded_task"),
    "reward_model.py: held-out rows are trained on": (
        "reward_model.py", "train, share = hold_out(",
        "_, share = hold_out(",
        "tests/test_companions.py::test_reward_model_centres_on_the_chosen_answers_of_the_training_pairs"),
    "reward_model.py: a large model gets the default rate": (
        "reward_model.py", "check_rate(args, \"reward_model\", model)",
        "pass",
        "tests/test_companions.py::test_a_default_rate_does_not_reach_a_large_model"),
    "reward_model.py: held-out rows of the embedded task stay with own data": (
        "reward_model.py", "eval_data=None",
        "local_rank=None",
        "tests/test_companions.py::test_own_data_leave_nothing_of_the_embedded_task"),
    "dpo.py: held-out rows are trained on": (
        "dpo.py", "train, share = hold_out(",
        "_, share = hold_out(",
        "tests/test_companions.py::test_dpo_continues_the_prompts_of_the_held_out_pairs_each_once"),
    "dpo.py: a large model gets the default rate": (
        "dpo.py", "check_rate(args, \"dpo\", model)",
        "pass",
        "tests/test_companions.py::test_a_default_rate_does_not_reach_a_large_model"),
    "dpo.py: held-out rows of the embedded task stay with own data": (
        "dpo.py", "eval_data=None",
        "local_rank=None",
        "tests/test_companions.py::test_own_data_leave_nothing_of_the_embedded_task"),
    "reward_model.py: the rejected answers are the demonstrations": (
        "reward_model.py", "[chosen for chosen, _, _ in train]",
        "[rejected for _, rejected, _ in train]",
        "tests/test_companions.py::test_reward_model_centres_on_the_chosen_answers_of_the_training_pairs"),
    "sft.py: --warmup_ratio is ignored": (
        "sft.py", "math.ceil(args.warmup_ratio * total_steps)",
        "math.ceil(Args.warmup_ratio * total_steps)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: warm-up is rounded down": (
        "sft.py", "math.ceil(args.warmup_ratio * total_steps)",
        "int(args.warmup_ratio * total_steps)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: a checkpoint forgets the first evaluation": (
        "sft.py", "{\"before\": state[\"before\"]}",
        "{\"before\": None}",
        "tests/test_sft_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "reward_model.py: --warmup_ratio is ignored": (
        "reward_model.py", "math.ceil(args.warmup_ratio * total_steps)",
        "math.ceil(Args.warmup_ratio * total_steps)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: warm-up is rounded down": (
        "reward_model.py", "math.ceil(args.warmup_ratio * total_steps)",
        "int(args.warmup_ratio * total_steps)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: a checkpoint forgets the first evaluation": (
        "reward_model.py", "(folder, step, {\"model\": engine}, state)",
        "(folder, step, {\"model\": engine}, {**state, \"before\": None})",
        "tests/test_reward_model_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "sft.py: the model stays in eval mode after an evaluation: no checkpointing": (
        "sft.py", "        engine.train()\n",
        "",
        "tests/test_sft_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "dpo.py: the model stays in eval mode after an evaluation: no checkpointing": (
        "dpo.py", "        engine.train()\n",
        "",
        "tests/test_dpo_whole.py::test_checkpointing_and_timeout_are_passed_on"),
    "sft.py: --num_samples is ignored": (
        "sft.py", "rows_of_this_rank(held_out[: args.num_samples])",
        "rows_of_this_rank(held_out)",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: training rows are evaluated": (
        "sft.py", "evaluate_loss(engine, held_out, tokenizer, args)",
        "evaluate_loss(engine, train, tokenizer, args)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: samples continue training prompts": (
        "sft.py", "rows_of_this_rank(held_out[: args.num_samples])",
        "rows_of_this_rank(train[: args.num_samples])",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: --seed is ignored in sampling": (
        "sft.py", "args, args.micro_batch_size, args.seed)",
        "args, args.micro_batch_size, 1)",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: --temperature is ignored": (
        "utils/sampling.py", "temperature=args.temperature",
        "temperature=1.0",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: --response_length is ignored": (
        "utils/sampling.py", "max_new_tokens=args.response_length",
        "max_new_tokens=24",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: the folder's sampling settings are followed": (
        "utils/sampling.py", "top_k=0, top_p=1.0, repetition_penalty=1.0,",
        "top_p=1.0,",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: stored sampling settings stay with the model": (
        "utils/models.py", "    model.generation_config = GenerationConfig(",
        "    _ = GenerationConfig(",
        "tests/test_sft_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "sft.py: held-out prompt tokens count with --completion_only": (
        "sft.py", "args.completion_only, engine.device)",
        "False, engine.device)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: held-out tokens are counted with the prompts": (
        "sft.py", "sum(count_labels(item, args.completion_only) for item in items)",
        "sum(count_labels(item, False) for item in items)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: training tokens are counted with the prompts": (
        "sft.py", "sum(count_labels(item, args.completion_only) for items in batch for item in items)",
        "sum(count_labels(item, False) for items in batch for item in items)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --completion_only is ignored in training": (
        "sft.py", "args.completion_only, device)",
        "False, device)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the logged loss is that of the last micro-batch": (
        "sft.py", "loss_sum += mb_loss_sum.detach()",
        "loss_sum = mb_loss_sum.detach()",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --pack_length is ignored": (
        "sft.py", "pack(train, args.pack_length)",
        "pack(train, 0)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: only some samples are kept": (
        "sft.py", "tracker.samples(step, rows)",
        "tracker.samples(step, rows[:10])",
        "tests/test_sft_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "sft.py: ROUGE with stems": (
        "utils/rouge.py", "tokenizer=words)",
        "use_stemmer=True)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the rate of the next optimizer step is used": (
        "sft.py", "optimizer_step(engine, lr)",
        "optimizer_step(engine, args.lr)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: --max_grad_norm is ignored": (
        "utils/launch.py", "args.max_grad_norm, engine.grad_norm)",
        "1.0, engine.grad_norm)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "sft.py: the norm after clipping is reported": (
        "utils/launch.py", "            engine.grad_norm = torch.nn.utils.get_total_norm(grads)",
        "            engine.grad_norm = torch.nn.utils.get_total_norm(grads).clamp(max=args.max_grad_norm)",
        "tests/test_sft_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --seed is ignored in the head": (
        "reward_model.py", "init_head(model, args.seed)",
        "init_head(model, 1)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the constant is that of the training pairs": (
        "reward_model.py", "engine, demonstrations, tokenizer.pad_token_id",
        "engine, [pair[0] for pair in train], tokenizer.pad_token_id",
        "tests/test_reward_model_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "reward_model.py: the constant is not saved": (
        "reward_model.py", "model.config.reward_mean = float(scores.mean())",
        "model.reward_mean = float(scores.mean())",
        "tests/test_reward_model_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "reward_model.py: the interval is over rows": (
        "reward_model.py", "clustered_interval(correct, prompts)",
        "clustered_interval(correct, range(len(correct)))",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: all samples are kept": (
        "reward_model.py", "samples += rows[:10]",
        "samples += rows",
        "tests/test_reward_model_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "reward_model.py: samples of the last file alone": (
        "reward_model.py", "samples += rows[:10]",
        "samples = rows[:10]",
        "tests/test_reward_model_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "reward_model.py: calibration of rejected against chosen": (
        "reward_model.py", "calibration(chosen_scores, rejected_scores)\n\n\n# ",
        "calibration(rejected_scores, chosen_scores)\n\n\n# ",
        "tests/test_reward_model_whole.py::test_summary_and_card_say_what_the_run_did"),
    "reward_model.py: figures of the last micro-batch alone": (
        "reward_model.py", "sums += torch.stack",
        "sums = torch.stack",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the shorter completion wins": (
        "reward_model.py", "accuracy([len(ids) for ids in chosen], [len(ids) for ids in rejected])",
        "accuracy([len(ids) for ids in rejected], [len(ids) for ids in chosen])",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: shuffled prompts are the own ones": (
        "reward_model.py", "distinct[1:] + distinct[:1]",
        "distinct",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: too long strangers are kept": (
        "reward_model.py", "if max(map(len, pair)) <= args.max_length]\n",
        "]\n",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: correlation of the chosen ones alone": (
        "reward_model.py", "np.corrcoef(lengths, all_scores)[0, 1]",
        "np.corrcoef(lengths[: len(chosen)], chosen_scores)[0, 1]",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: mean scores swapped": (
        "reward_model.py", "\"chosen_rewards\": np.mean(chosen_scores), \"rejected_rewards\": np.mean(rejected_scores)",
        "\"chosen_rewards\": np.mean(rejected_scores), \"rejected_rewards\": np.mean(chosen_scores)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: --accuracy_by the first column alone": (
        "reward_model.py", "for column in args.accuracy_by:",
        "for column in args.accuracy_by[:1]:",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: too long demonstrations are kept": (
        "reward_model.py", "kept = [ids for ids in encoded if len(ids) <= args.max_length]",
        "kept = encoded",
        "tests/test_reward_model_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "reward_model.py: the spread in the summary is a variance": (
        "reward_model.py", "\"reward_std\": float(scores.std())",
        "\"reward_std\": float(scores.var())",
        "tests/test_reward_model_whole.py::test_summary_and_card_say_what_the_run_did"),
    "reward_model.py: CNN/DM is not set apart": (
        "utils/data.py", "pair[-1].get(\"batch\") in CNNDM_BATCHES",
        "False",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: scores of samples swapped": (
        "reward_model.py", "\"chosen_score\": good",
        "\"chosen_score\": bad",
        "tests/test_reward_model_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "reward_model.py: the loss of a step is a mean over micro-batches": (
        "reward_model.py", "losses.sum() / len(batch) * world_size()",
        "losses.mean() * world_size()",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: calibration of the first evaluation is kept": (
        "reward_model.py", "tracker.log(step, metrics), calibrations",
        "tracker.log(step, metrics), state.get(\"calibration\", calibrations)",
        "tests/test_reward_model_whole.py::test_summary_and_card_say_what_the_run_did"),
    "reward_model.py: one held-out file is evaluated under both names": (
        "reward_model.py", "engine, pairs, tokenizer, args, shuffle=step",
        "engine, [*held_out.values()][0], tokenizer, args, shuffle=step",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: prompts are shuffled at every evaluation": (
        "reward_model.py", "shuffle=step == total_steps)",
        "shuffle=True)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: the prompt's length counts in the correlation": (
        "reward_model.py", "len(ids) - prompt_length[prompt]",
        "len(ids)",
        "tests/test_reward_model_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "reward_model.py: SIGTERM is not heard while it only scores": (
        "reward_model.py", "raise Interrupted\n",
        "pass\n",
        "tests/test_reliability.py::test_sigterm_while_the_reward_model_only_scores"),
    "reward_model.py: --eval_batch_size is ignored in evaluations": (
        "reward_model.py", "sequences, tokenizer.pad_token_id, args.eval_batch_size)",
        "sequences, tokenizer.pad_token_id, 64)",
        "tests/test_reliability.py::test_sigterm_while_the_reward_model_only_scores"),
    "reward_model.py: --eval_batch_size is ignored in the normalisation": (
        "reward_model.py", "demonstrations, tokenizer.pad_token_id, args.eval_batch_size)",
        "demonstrations, tokenizer.pad_token_id, 64)",
        "tests/test_reliability.py::test_sigterm_while_the_reward_model_only_scores"),
    "reward_model.py: an interrupted evaluation counts as done": (
        "reward_model.py", "{**state, \"evaluated\": False}",
        "state",
        "tests/test_reliability.py::test_sigterm_while_the_reward_model_only_scores"),
    "reward_model.py: the rows of an evaluation that comes again stay": (
        "reward_model.py", "else 0, state[\"evaluated\"])",
        "else 0)",
        "tests/test_reliability.py::test_an_evaluation_that_is_made_again_leaves_no_row_twice"),
    "dpo.py: --warmup_ratio is ignored": (
        "dpo.py", "math.ceil(args.warmup_ratio * total_steps)",
        "math.ceil(Args.warmup_ratio * total_steps)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: warm-up is rounded down": (
        "dpo.py", "math.ceil(args.warmup_ratio * total_steps)",
        "int(args.warmup_ratio * total_steps)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the judge gets responses as queries": (
        "dpo.py", "texts = [row[\"query\"] for row in rows], [row[\"response\"] for row in rows]",
        "texts = [row[\"response\"] for row in rows], [row[\"query\"] for row in rows]",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the interval is over rows": (
        "dpo.py", "[pair.row[\"prompt\"] for pair in pairs])",
        "range(len(pairs)))",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --lr_schedule is ignored": (
        "dpo.py", "cosine_lr if args.lr_schedule == \"cosine\" else constant_lr",
        "cosine_lr",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the logged loss lacks the NLL": (
        "dpo.py", "loss += args.nll_coef * nll\n",
        "pass\n",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the NLL is not in the loss": (
        "dpo.py", "args.nll_coef * logprobs[0].sum() / chosen_tokens",
        "0 * logprobs[0].sum()",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --num_eval_prompts is ignored": (
        "dpo.py", "prompts = prompts[: args.num_eval_prompts]",
        "prompts = prompts[:500]",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: training prompts are continued": (
        "dpo.py", "load_prompts(args.eval_prompts,",
        "load_prompts(args.train_data,",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: one held-out file is evaluated under both names": (
        "dpo.py", "evaluate_pairs(engine, pairs, held_out_ref[name], args)",
        "evaluate_pairs(engine, [*held_out.values()][0], [*held_out_ref.values()][0], args)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: cached reference of other pairs": (
        "dpo.py", "[i or 0 for i in mb_indices]",
        "list(range(len(mb_indices)))",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --beta is ignored in evaluations": (
        "dpo.py", "chosen, rejected = args.beta * (logprobs - ref_logprobs)",
        "chosen, rejected = logprobs - ref_logprobs",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --beta is ignored in the logged rewards": (
        "dpo.py", "rewards = args.beta * (logprobs - ref_logprobs)",
        "rewards = (logprobs - ref_logprobs)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: cut responses end with EOS": (
        "dpo.py", "row.get(f\"{side}_finished\") is not False",
        "True",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --ref_model is ignored": (
        "dpo.py", "load_causal_lm(ref_path, ref_flag, tokenizer, args.bf16)",
        "load_causal_lm(args.model, \"--model\", tokenizer, args.bf16)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: fewer first samples are kept": (
        "dpo.py", "for row in rows[:20]]",
        "for row in rows[:8]]",
        "tests/test_dpo_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "dpo.py: more first samples are kept": (
        "dpo.py", "for row in rows[:20]]",
        "for row in rows]",
        "tests/test_dpo_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "dpo.py: before and after swapped in the summary's samples": (
        "dpo.py", "\"before\": before, \"after\": row[\"response\"]}",
        "\"before\": row[\"response\"], \"after\": before}",
        "tests/test_dpo_whole.py::test_summary_and_card_say_what_the_run_did"),
    "dpo.py: --ref_cache is ignored": (
        "dpo.py", "    if not args.ref_cache:\n        return compute()",
        "    if True:\n        return compute()",
        "tests/test_dpo_whole.py::test_reference_cache_has_the_references_logprobs"),
    "dpo.py: a checkpoint forgets the first samples": (
        "dpo.py", "save_checkpoint(folder, step, {\"model\": engine}, state)",
        "save_checkpoint(folder, step, {\"model\": engine}, {\"before\": state[\"before\"]})",
        "tests/test_dpo_whole.py::test_weights_equal_those_of_the_plain_loop"),
    "dpo.py: --label_smoothing is ignored": (
        "dpo.py", "[args.label_smoothing] if args.label_smoothing else []",
        "[]",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: one word makes a start": (
        "dpo.py", "row.pop(\"tokens\")[:4]",
        "row.pop(\"tokens\")[:1]",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: figures of the last micro-batch alone": (
        "dpo.py", "sums += torch.stack",
        "sums = torch.stack",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: tokens of rejected responses divide the NLL": (
        "dpo.py", "chosen_tokens = sum(len(train[i].chosen) for i in batch)",
        "chosen_tokens = sum(len(train[i].rejected) for i in batch)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: --seed is ignored in sampling": (
        "dpo.py", "args.seed + rank()",
        "1 + rank()",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: chosen and rejected rewards swapped": (
        "dpo.py", "\"rewards/chosen\": chosen, \"rewards/rejected\": rejected,",
        "\"rewards/chosen\": rejected, \"rewards/rejected\": chosen,",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: held-out loss without --loss": (
        "dpo.py", "losses = preference_losses(torch.tensor(logprobs), torch.tensor(ref_logprobs), args)",
        "losses = sigmoid_losses(torch.tensor(logprobs), torch.tensor(ref_logprobs), args.beta)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the judge's figure is of the first row": (
        "dpo.py", "np.mean([row[name] for row in rows]) for name in names",
        "np.mean([row[name] for row in rows[:5]]) for name in names",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: the card has the first accuracy": (
        "dpo.py", "{after[f'eval/{name}/rewards/accuracies']:.3f}",
        "{state['before'][f'eval/{name}/rewards/accuracies']:.3f}",
        "tests/test_dpo_whole.py::test_summary_and_card_say_what_the_run_did"),
    "dpo.py: the loss of a step is a mean over micro-batches": (
        "dpo.py", "losses.sum() / len(batch) -",
        "losses.mean() -",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
    "dpo.py: samples of an evaluation are not kept at step 0": (
        "dpo.py", "tracker.samples(step, rows)",
        "tracker.samples(step, rows) if step else None",
        "tests/test_dpo_whole.py::test_samples_equal_those_of_the_plain_loop"),
    "dpo.py: the rate given is the peak": (
        "dpo.py", "optimizer_step(engine, lr)",
        "optimizer_step(engine, args.lr)",
        "tests/test_dpo_whole.py::test_metrics_equal_those_of_the_plain_loop"),
}
