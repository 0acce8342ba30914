"""
The machine: device, dtype, speed, and the processes of a run. A single process without a GPU is the trivial case.

torchrun passes each process its rank in environment variables. On GPUs, each process uses one.
"""
import atexit
import inspect
import itertools
import math
import os
import sys
import time
from functools import cached_property

import torch
import torch._functorch.config
import torch.distributed as dist

from model import Block, keep_freed_memory

# Dense FLOP/s in bfloat16 (V100, T4: float16) with float32 accumulation, from NVIDIA's and AMD's datasheets. Figures
# "with sparsity" are halved; each half of an MI250X is a device. The first key that occurs as whole words in the GPU's
# name is used.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200 NVL': 835.5e12, 'H200': 989.4e12, 'GH200': 989.4e12, 'H100 PCIe': 756e12,
    'H100 NVL': 835.5e12, 'H100': 989.4e12, 'A100': 312e12, 'A40': 149.7e12, 'A30': 165e12, 'A10G': 70e12,
    'A10': 125e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'T4': 65e12, 'V100': 125e12, 'RTX A6000': 154.8e12,
    'RTX 3090': 71.2e12, 'RTX 4090': 165.2e12, 'RTX 5090': 209.5e12, 'MI250X': 191.5e12, 'MI300X': 1307.4e12,
}


def process_number():
    """The rank that torchrun gave this process; 0 for a single process."""
    return int(os.environ.get('RANK', 0))


class Machine:
    """The hardware and the processes that a script computes with. ValueError if there is no such device.

    device, kind  such as 'cuda:1', and its type: 'cuda', 'cpu' or 'mps'
    dtype         name of the dtype of matrix products; autocast is the context that applies it
    scaler        GradScaler for float16; does nothing for other dtypes
    rank, world   rank of this process, and number of processes
    sharded       whether the weights are sharded over the processes (fully_shard), not replicated
    compiled      whether torch.compile is on: wrap() decides
    bad_steps     a tensor: number of consecutive steps with a non-finite gradient
    """
    def __init__(self, device='auto', dtype='auto', peak_flops='auto', parallel='ddp', deterministic=False):
        self.rank, self.world = process_number(), int(os.environ.get('WORLD_SIZE', 1))
        if self.world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device, self.dtype = resolve(device, dtype)
        self.kind, self.torch_dtype = torch.device(self.device).type, getattr(torch, self.dtype)
        self.sharded, self.compiled, self.peak_flops = parallel == 'fsdp' and self.world > 1, False, peak_flops
        self.autocast = torch.autocast(self.kind, self.torch_dtype, enabled=self.dtype != 'float32')
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.dtype == 'float16')
        if deterministic: # before the first matrix product
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
            torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision('high') # TF32 where float32 remains on a GPU
        self.bad_steps = torch.zeros((), device=self.device)
        self.votes, self.next_vote, self.voted_at = 0, 1, time.perf_counter()
        self.lap_began, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def __str__(self):
        how, parallel = ('compiled' if self.compiled else 'eager'), ('sharded, ' if self.sharded else '')
        flops, source = self.peak
        peak = f'{flops / 1e12:.4g} TFLOP/s' if flops else 'n/a'
        return f'{self.device}, {self.dtype}, {how}, {parallel}world size {self.world}; peak {peak} ({source})'

    # a step

    def wrap(self, model, compile='auto', backend='auto', lengths=1):
        """Returns (model, compiled, sharded or wrapped in DDP as needed; notes to print). model must be on the device.
        lengths: number of different sequence lengths that it will see.
        """
        self.model, self.replicate, notes = model, lambda tensor: tensor, []
        if self.kind == 'cpu':
            keep_freed_memory()
        if self.world > 1:
            self.connect(backend)
        if self.sharded:
            self.replicate = shard(model, self.kind, self.torch_dtype, self.world)
        if compile == 'auto':
            compile = self.kind == 'cuda' and self.can_compile(notes)
        self.compiled = compile
        if model.config.recompute == 'cheap' and not compile:
            notes.append("note     recompute='cheap' has no effect without torch.compile, which is off")
        if compile:
            torch._dynamo.config.recompile_limit = 2 * lengths + 8 # for training and for evaluation
            torch._functorch.config.ban_recompute_materialized_backward = model.config.recompute != 'cheap'
            if lengths > 1:
                notes.append(f"note     {lengths} lengths are compiled one by one, each at its first step")
            # symbolic lengths would compile three times as often
            model = torch.compile(model, dynamic=False)
        if self.world > 1 and not self.sharded:
            # buffers are constant, so no broadcast; gradients need no copy besides the all-reduce buckets
            DDP = torch.nn.parallel.DistributedDataParallel
            names = inspect.signature(DDP).parameters
            constant = 'forward_sync_buffers' if 'forward_sync_buffers' in names else 'broadcast_buffers' # before 2.13
            gpus = [self.device] if self.kind == 'cuda' else None
            model = DDP(model, device_ids=gpus, gradient_as_bucket_view=True, **{constant: False})
        self.wrapped = model
        return model, notes

    def can_compile(self, notes):
        """Whether torch.compile works here: it needs a compiler, triton and a supported Python version."""
        try:
            if torch.compile(lambda x: x + 1)(torch.ones(1, device=self.device)).item() == 2:
                return True
            problem = "it takes 1 + 1 for something else than 2"
        except Exception as e: # they may raise anything
            problem = (str(e).strip().splitlines() or [type(e).__name__])[0]
        notes.append(f"not compiling, since torch.compile fails here: {problem}")
        return False

    def seed(self, seed, step):
        """Makes dropout masks a function of seed, step and rank, so that a resumed run draws the same ones."""
        torch.manual_seed(((seed * 1_000_003 + step) * 4096 + self.rank) % 2 ** 63)

    def exchange_gradients(self, yes):
        """Sets whether the next backward pass reduces gradients over the processes."""
        if self.sharded:
            self.model.set_requires_gradient_sync(yes)
        self.wrapped.require_backward_grad_sync = yes # read by DDP only

    def clip_gradients(self, limit):
        """Clips the global gradient norm to limit (0: no clipping). Returns the norm before clipping, a tensor."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit or float('inf'))
        return norm.full_tensor() if self.sharded else norm

    def step(self, optimizer, norm):
        """Optimizer step, which changes nothing if the norm is not finite. The decision does not wait for a GPU."""
        bad = ~torch.isfinite(norm)
        self.bad_steps = (self.bad_steps + 1) * bad
        if self.kind == 'mps' and bad: # its optimizer ignores found_inf; without gradients it changes nothing
            optimizer.zero_grad(set_to_none=True)
        elif self.kind != 'mps' and not self.scaler.is_enabled():
            optimizer.grad_scale, optimizer.found_inf = None, self.replicate(bad.float())
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    # processes

    def connect(self, backend):
        if backend == 'gloo' and self.kind == 'cuda' and self.sharded:
            raise ValueError("backend='gloo' cannot gather the weights that parallel='fsdp' shards over GPUs: use "
                             "--backend=nccl")
        # torchrun keeps its store when it restarts lost processes: the prefix hides the addresses of dead ones
        store, _, _ = next(dist.rendezvous('env://'))
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        name = dict(auto=dict(cuda='nccl').get(self.kind, 'gloo')).get(backend, backend)
        hook = sys.excepthook
        dist.init_process_group(name, rank=self.rank, world_size=self.world, store=store)
        sys.excepthook = hook # torch's would swallow the words of one that exits

    def deal(self, items):
        """Deals items to the processes: yields (item, whether it counts), equally often in each, as sharding needs."""
        items = iter(items)
        while hand := list(itertools.islice(items, self.world)):
            yield hand[min(self.rank, len(hand) - 1)], self.rank < len(hand)

    def reduce(self, numbers, how='SUM'):
        """All-reduces numbers or a tensor (sum, or another ReduceOp). Returns a list, or a number for a scalar."""
        total = numbers if torch.is_tensor(numbers) else torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total, getattr(dist.ReduceOp, how))
        return total.tolist()

    def agree(self, number):
        """The maximum of number over all processes, returned to all of them at the same call. An all-reduce waits for
        the slowest process, so it happens only once a second, or at every call if these are farther apart.
        """
        self.votes += 1
        if self.world == 1:
            return number
        if self.votes < self.next_vote:
            return 0
        now = time.perf_counter()
        largest, pause = self.reduce([number, (now - self.voted_at) / self.votes], 'MAX')
        self.votes, self.next_vote, self.voted_at = 0, max(1, int(1 / pause)), now
        return int(largest)

    def exit(self, status):
        """Ends the process. With several, skips Python's teardown, where a gloo thread may abort (pytorch 190489)."""
        if self.world > 1:
            dist.destroy_process_group()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)

    # memory and speed

    def put(self, *arrays):
        """Copies numpy arrays to the device as tensors."""
        tensors = map(torch.from_numpy, arrays)
        if self.kind == 'cuda':
            return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        return [tensor.to(self.device) for tensor in tensors]

    def budget(self, network, state, activations, accumulates):
        """
        Returns lines about the memory that training will need per process. state: numbers that the optimizer keeps;
        activations: bytes; accumulates: whether a process adds the gradients of several micro-batches.
        """
        if math.isnan(activations):
            return ["memory   unknown: torch's meta device cannot run a step of this network"]
        n = gradients = network.get_num_params(False)
        if self.sharded: # gradients are whole until the last micro-batch, and what is outside of blocks is gathered
            n_blocks = sum(p.numel() for m in network.modules() if isinstance(m, Block) for p in m.parameters())
            activations += 4 * (n - n_blocks)
            n, state, gradients = n / self.world, state / self.world, n if accumulates else n / self.world
        elif self.world > 1:
            # DDP's buckets, laid out anew beside the first ones in the second step; gradients add up outside of them
            gradients *= 2 + accumulates
        fixed, rest, words = 4 * (n + gradients + state), 0.0, ''
        if self.kind == 'cpu': # both measured on Linux; glibc's heap keeps what was freed in pieces
            rest = 0.34e9 + 0.6 * activations
            words = f", {rest / 1e9:.3g} of libraries and gaps between these"
        need = fixed + activations + rest
        lines = [f"memory   about {need / 1e9:.3g} GB: {fixed / 1e9:.3g} of weights, gradients and optimizer, "
                 f"{activations / 1e9:.3g} of activations{words}"]
        if need > self.memory:
            lines.append(f"warning: {self.device} has {self.memory / 1e9:.3g} GB: if it does not fit, lower "
                         "batch_size and raise gradient_accumulation_steps in proportion: the steps stay the same")
        return lines

    def count(self, tokens, flops):
        """Adds tokens that all processes together have trained on in this lap, and what each took."""
        self.tokens, self.flops = self.tokens + tokens, self.flops + tokens * flops

    def lap(self):
        """Returns (seconds since the last call, tokens per second, MFU or None if the peak is unknown)."""
        now = time.perf_counter()
        seconds, (peak, _) = now - self.lap_began, self.peak
        known = peak and self.flops >= 0 # not nan
        speed, mfu = self.tokens / seconds, self.flops / seconds / (peak * self.world) if known else None
        self.lap_began, self.tokens, self.flops = now, 0, 0.0
        return seconds, speed, mfu

    @cached_property
    def peak(self):
        """(peak FLOP/s for MFU, or None; where the number comes from)"""
        return find_peak_flops(self.peak_flops, self.device, self.torch_dtype)

    @property
    def memory(self):
        """Total bytes of GPU memory, or of main memory; infinite if unknown."""
        if self.kind == 'cuda':
            return torch.cuda.get_device_properties(self.device).total_memory
        on_windows = sys.platform == 'win32'
        return math.inf if on_windows else os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')

    @property
    def peak_memory(self):
        """Peak memory in bytes, of the GPU or of the process; None if unknown."""
        if self.kind == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == 'win32':
            return None
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * {'darwin': 1}.get(sys.platform, 1024)


def shard(model, kind, dtype, world):
    """Shards the weights of a GPT over the processes. Returns a function that replicates a tensor on their mesh."""
    from torch.distributed.device_mesh import init_device_mesh # these take a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Replicate
    mesh = init_device_mesh(kind, (world,))
    # modules with nothing but matrices are gathered in the dtype of their products (half the bytes), others in float32;
    # norms, of a few numbers, with the model's own, as each gather of a block's would wait for the other processes
    policy = MixedPrecisionPolicy(dtype, torch.float32)
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        parts = [part for part in (block.attn, block.mlp) if part is not None]
        narrow = [part for part in parts
                  if all(isinstance(m, torch.nn.Linear) for m in part.modules() if m._parameters)]
        for part in narrow:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        if len(narrow) < len(parts):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'hidden') # which generation calls
    return lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()])


# ---------------------------------------------------------------------------------------------------------------------
# What `auto` means on this machine

def resolve(device, dtype):
    """Resolves 'auto'. Returns (device, name of dtype). ValueError if this machine has no such device."""
    if device == 'auto':
        device = (torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')).type
    try:
        kind = torch.device(device).type
        torch.zeros(1, device=device).item() # 'meta' has no numbers
        if kind == 'cuda' and ':' in device: # torch refuses 'cuda', the current one
            torch.cuda.set_device(device) # streams, graphs and timings use the current device
    except (RuntimeError, AssertionError, ImportError) as e: # torch's errors for a missing device
        raise ValueError(f"device={device!r} is not there ({str(e).splitlines()[0]}): use --device=auto") from None
    return device, fast_dtype(kind) if dtype == 'auto' else dtype


def fast_dtype(kind):
    """Name of the fastest dtype for matrix products on this kind of device."""
    if kind == 'cuda':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    # only if the processor has instructions for it: otherwise bfloat16 is emulated and slow
    native = kind == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return 'bfloat16' if native else 'float32'


def find_peak_flops(setting, device, dtype):
    """Returns (peak FLOP/s or None, where the number comes from).

    setting: a number; 'measure': see measure_flops; 'auto': from the table for a GPU in 16 bits, measured on a CPU.
    """
    device = torch.device(device)
    if setting not in ('auto', 'measure'):
        return float(setting), 'as set'
    if setting == 'measure' or device.type == 'cpu':
        n, flops = measure_flops(device, dtype)
        return flops, f'measured: {n}x{n} matrix product in {str(dtype).removeprefix("torch.")}'
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    words = f" {name.replace('-', ' ')} "
    card = next((card for card in PEAK_FLOPS if f' {card} ' in words), None)
    if card is None or ' Laptop ' in words or dtype == torch.float32:
        return None, f"no 16-bit figure for {name}; set --peak_flops=312e12 (its datasheet's) or --peak_flops=measure"
    return PEAK_FLOPS[card], f'datasheet of {card}, dense'


def measure_flops(device, dtype):
    """Returns (n, FLOP/s) of the fastest n x n matrix product, in the layout of Linear layers: a realistic ceiling.

    On a CPU without bfloat16 a large product takes minutes, so n grows only while the product is quick.
    """
    largest = 2048 if device.type == 'cpu' else 8192
    n, found = 256, []
    while True:
        x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(5):
            t0 = time.perf_counter()
            torch.nn.functional.linear(x, w)[0, 0].item() # waits for the device
            times.append(time.perf_counter() - t0)
            if sum(times) > 0.5:
                break
        found.append((2 * n ** 3 / min(times), n))
        if n >= largest or 8 * min(times) > 0.015: # a larger one would add 0.15 s to the start and reach no more
            flops, n = max(found)
            return n, flops
        n *= 2
