"""Plumbing between the command line and the algorithm: ranks, devices, DeepSpeed engines, one-line errors."""

import contextlib
import errno
import logging
import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

# ---- Errors -----------------------------------------------------------------------------------------------


# What flags of these names must be, in whatever script has them.
AT_LEAST_1 = {
    "epochs", "batch_size", "micro_batch_size", "rollout_batch_size", "total_episodes", "num_ppo_epochs",
    "num_minibatches", "response_length", "max_length", "max_prompt_length", "num_eval_prompts", "eval_every",
    "save_every", "log_every", "eval_batch_size", "num_prompts", "judge_parallel", "episodes_per_prompt"}
AT_LEAST_0 = {
    "seed", "num_samples", "pack_length", "lr", "critic_lr", "weight_decay", "adam_eps", "max_grad_norm", "kl_coef",
    "vf_coef", "cliprange", "cliprange_value", "nll_coef", "judge_budget", "score_clip", "beta_critic", "beta_policy",
    "group_head_lr"}
ABOVE_0 = {
    "temperature", "top_p", "repetition_penalty", "timeout_minutes", "beta", "judge_timeout",
    "judge_requests_per_minute"}
AT_MOST_1 = {"top_p", "gamma", "lam", "warmup_ratio"}


def fail(message):
    """End the program with exit code 1 and one line from rank 0. Every rank must come to the same verdict."""
    if rank() == 0:
        # names and texts from files are in it: none can break the line or reach the terminal's controls
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
        print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def fail_together(message):
    """Fail on every rank if any rank has a message; None: nothing is wrong here. Every rank must call it."""
    wrong = next((found for found in gather_rows([message]) if found), None)
    if wrong:
        fail(wrong)


allowed = {"pickle": False}  # by --allow_pickle, for utils/models.py
renamed = {}  # by --columns, for utils/data.py: the name in a file, and the name that the scripts read


def escape_output():
    """What the encoding of the terminal or log file lacks is printed escaped, and raises no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def check_flags(args):
    """Fail in one line on a number that makes no sense, before anything is loaded."""
    escape_output()
    allowed["pickle"] = args.allow_pickle
    read_columns(args.columns)
    for name, value in vars(args).items():
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and text != text.encode("utf-8", "replace").decode():  # bytes, read as no text
                fail(f"--{name} {text}: not UTF-8 in this locale. Set PYTHONUTF8=1 in the environment")
        for names, holds, words in (
            (AT_LEAST_1, lambda x: x >= 1, "at least 1"), (AT_LEAST_0, lambda x: x >= 0, "at least 0"),
            (ABOVE_0, lambda x: x > 0, "above 0"), (AT_MOST_1, lambda x: 0 <= x <= 1, "between 0 and 1"),
            ({"zero_stage"}, lambda x: x in (0, 2, 3), "0, 2 or 3"),
            ({"num_groups"}, lambda x: x >= 2, "at least 2"),
            ({"label_smoothing"}, lambda x: 0 <= x < 0.5, "at least 0 and below 0.5"),
        ):
            if name in names and value is not None and not holds(value):
                fail(f"--{name} {value}: must be {words}")
    if getattr(args, "offload_optimizer", False) and inner_zero_stage(args) == 0:
        fail("--offload_optimizer needs --zero_stage 2 or 3, or --bf16")


def read_columns(pairs):
    """Keep what --columns says, or fail in one line."""
    renamed.clear()
    for pair in pairs:
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and theirs):
            fail(f"--columns {pair}: write our name, =, and the name in your file, as in prompt=question")
        if ours in renamed.values() or theirs in renamed:
            fail(f"--columns {pair}: {ours if ours in renamed.values() else theirs} stands there twice")
        renamed[theirs] = ours


def given(args, flag):
    """Whether the user has given a flag: its value is not the default, or it stands on the command line.

    Where a script is called from Python, a value that equals the default counts as not given.
    """
    on_command_line = {word.partition("=")[0].replace("-", "_") for word in sys.argv[1:]}
    return getattr(args, flag) != getattr(type(args), flag) or f"__{flag}" in on_command_line


def disk_fault(error):
    """What a disk that is full, gone or not writable says, in one line; None: the exception is something else."""
    if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        return f"{error.filename or 'a file'}: {error.strerror}"
    told = str(error).strip()
    if "inline_container" in told or type(error).__name__ == "SafetensorError":  # torch.save, safetensors
        return f"a file could not be written or read whole ({told.splitlines()[0]})"
    return None


said = []  # the one line


def end_in_one_line(kind, error, trace):
    """Python's last word on an exception that nobody caught: one line for a disk's fault, a traceback for ours."""
    told = disk_fault(error)
    if told is None:
        return sys.__excepthook__(kind, error, trace)
    if said:  # TensorBoard's thread has met the same fault
        return
    said.append(told)
    print(f"error: rank {rank()}: {told}. Complete checkpoints are untouched: mend the disk, then --resume a run that "
          "has one", file=sys.stderr, flush=True)


def print0(*args):
    """Print on rank 0."""
    if rank() == 0:
        print(*args, flush=True)


# ---- Ranks ------------------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(timeout_minutes=30.0):
    """Join the process group of whichever launcher started us (deepspeed, torchrun, plain python).

    Returns the torch.device of this rank. DeepSpeed's shared-memory op for CPUs is switched off: it is compiled
    at run time, and a machine without a C compiler would stop there.
    """
    sys.excepthook = end_in_one_line
    threading.excepthook = lambda thread: thread[0] is SystemExit or end_in_one_line(*thread[:3])
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # here and not above, so that --help and errors in the arguments come at once

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    launched = "WORLD_SIZE" in os.environ
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500).items():
        os.environ.setdefault(name, str(value))
    # One CPU thread a rank unless the user says otherwise: small models are fastest so (two threads that share
    # busy cores can be many times slower), and the same run gives the same bits on any number of cores.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        if not launched:  # one process alone: no port, so that none can be taken
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            deepspeed.init_distributed(backend, timeout=timedelta(minutes=timeout_minutes), verbose=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            fail(f"port {os.environ['MASTER_PORT']} is in use, by another run perhaps. Give this one a port of its own: "
                 "deepspeed --master_port 29501 ... or torchrun --master_port 29501 ...")
    return device


def finish():
    """Leave together: a rank that exits first can make the others abort."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def all_sum(tensor):
    """Sum of a tensor over all ranks, in place. Every rank must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor):
    """Maximum of a tensor over all ranks, in place. Every rank must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_rows(rows):
    """The lists of all ranks, interleaved back into one: rank r holds items r, r + world, r + 2 world, ..."""
    if world_size() == 1:
        return list(rows)
    shards = [None] * world_size()
    dist.all_gather_object(shards, list(rows))
    longest = max(len(shard) for shard in shards)
    return [shard[i] for i in range(longest) for shard in shards if i < len(shard)]


def from_rank0(make):
    """The result of `make()`, called on rank 0 alone and sent to the others. It must not use collectives."""
    box = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier():
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def on_device(model, device, offload):
    """Within, a frozen model (or None) is on its device; afterwards, with offload, in CPU memory again."""
    if model:
        model.to(device)
    yield
    if model and offload:
        model.to("cpu")


# ---- DeepSpeed --------------------------------------------------------------------------------------------


def deepspeed_config(args):
    """The whole DeepSpeed configuration. What matters for the numbers is written out, not left to a default [E18].

    Gradient accumulation is ours: a script calls `engine.backward(loss_sum / global_count * world_size)` for each
    micro-batch, then one `engine.step()`, so the two sizes below are only what DeepSpeed insists on.
    """
    zero = {"stage": inner_zero_stage(args)}
    if args.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if args.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_itself(args) else args.max_grad_norm,  # [detail 44] not DeepSpeed's 1.0
        "bf16": {"enabled": args.bf16},  # [detail 8] bf16 weights with fp32 master weights and optimizer state
        "data_types": {"grad_accum_dtype": "fp32"},  # else the sum over micro-batches is rounded to bf16 each time
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW offloads too, and needs no compiler
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }


def inner_zero_stage(args):
    """DeepSpeed's stage. With bf16, 0 is 2 inside: at 0 it accumulates in bf16, and starts with a dummy Adam step."""
    return args.zero_stage or (2 if args.bf16 else 0)


def clips_itself(args):
    """Plain fp32 at ZeRO 0, where DeepSpeed reports no gradient norm: `create_engine` measures and clips there."""
    return inner_zero_stage(args) == 0


def create_engine(model, optimizer, args):
    """Wrap a model and its torch optimizer for training. Call the engine, `backward`, then `optimizer_step`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(args))
    engine.grad_norm = None
    if clips_itself(args):

        def measure_and_clip(*_):  # runs after the gradients are averaged over the ranks, before the update
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            engine.grad_norm = torch.nn.utils.get_total_norm(grads)
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.max_grad_norm, engine.grad_norm)

        optimizer.register_step_pre_hook(measure_and_clip)
        engine.enable_backward_allreduce = world_size() > 1  # alone, DeepSpeed would copy all gradients twice
    engine.train()  # from_pretrained leaves models in eval mode, where gradient checkpointing does nothing
    return engine


def optimizer_step(engine, lr):
    """One optimizer step at this learning rate. Returns the global gradient norm before clipping (a tensor)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step()
    norm = engine.get_global_grad_norm() if engine.grad_norm is None else engine.grad_norm
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device)


def check_batch_size(batch_size, minibatches=1, total_episodes=None):
    """Fail in one line where ranks and minibatches cannot share a batch evenly, naming sizes that would work."""
    share = world_size() * minibatches
    most = batch_size + share if total_episodes is None else total_episodes
    if batch_size % share or batch_size > most:
        below, above = min(batch_size, most) // share * share, batch_size // share * share + share
        sizes = " or ".join(str(size) for size in (below, above) if 0 < size <= most)
        parts = f"{world_size()} ranks" + (f" x {minibatches} minibatches" if minibatches > 1 else "")
        limit = f" and be at most --total_episodes {total_episodes}" if total_episodes else ""
        fail(f"--batch_size {batch_size} must divide by {parts}{limit}; {sizes or 'no size'} would do")


def note_small_lr(lr, default, parameters):
    """Say that a rate of the papers' size does nothing visible to a model as small as the embedded one."""
    if lr <= 1e-6 and parameters < 1e8:
        print0(f"{'note':<22}--lr {lr:g} suits models of 1B parameters and more. This one has "
               f"{parameters / 1e6:.1f}M and will hardly move; its default is {default:g}")


def print_memory_plan(args, trained, frozen=0):
    """Print the bytes per rank of weights, gradients and Adam state for these numbers of parameters."""
    stage = inner_zero_stage(args)
    if stage != args.zero_stage:
        print0(f"{'bf16':<22}at ZeRO {stage} inside: DeepSpeed's ZeRO {args.zero_stage} has no fp32 gradients in bf16")
    shards = world_size() if stage >= 2 else 1
    weight, state = (2, 12) if args.bf16 else (4, 8)  # Adam's two moments, and with bf16 the fp32 master weights
    weights = trained * weight / (shards if stage == 3 else 1) + frozen * weight
    gradients, optimizer = trained * 4 / shards, trained * state / shards  # gradients are accumulated in fp32
    where = "in CPU memory" if args.offload_optimizer else "on the same device"
    print0(f"{'memory per rank':<22}{(weights + gradients) / 2**20:,.0f} MiB of weights and gradients, "
           f"{optimizer / 2**20:,.0f} MiB of optimizer state ({where}), and activations")


def full_state_dict(engine):
    """All weights of an engine on rank 0, gathered where ZeRO 3 has them in pieces. Every rank must call it."""
    if engine.zero_optimization_stage() < 3:
        return engine.module.state_dict()
    import deepspeed

    state = {}
    for name, param in engine.module.named_parameters():  # a tied weight once, as transformers saves it
        with deepspeed.zero.GatheredParameters([param]):
            if rank() == 0:
                state[name] = param.detach().cpu().clone()
    return state


@torch.no_grad()
def rollout_weights(engine, decoding_copy):
    """A module to decode with: the engine's own, or at ZeRO 3 `decoding_copy`, filled with the gathered weights.

    Decoding through ZeRO 3 itself gathers every layer for every token, and hangs where ranks stop at different
    lengths. Every rank must call it.
    """
    if engine.zero_optimization_stage() < 3:
        return engine.module
    import deepspeed

    for param, copy in zip(engine.module.parameters(), decoding_copy.parameters()):
        with deepspeed.zero.GatheredParameters([param]):
            copy.copy_(param)
    return decoding_copy
