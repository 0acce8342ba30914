"""
Weights on disk, also loaded into a different architecture, and the state of a run.

A checkpoint is a dict of tensors and plain values in torch's own zip format. Opening one executes no code.
"""
import errno
import math
import os
import re
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from data.tokens import find_path, first_few
from model import GPT, MIXERS, GPTConfig, optimizer_groups, own_settings

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
TIED = ('transformer.wte.weight', 'lm_head.weight')
NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


# ---------------------------------------------------------------------------------------------------------------------
# Files

def save_checkpoint(path, checkpoint):
    """Replaces path atomically: whatever happens, it is either the complete old checkpoint or the complete new one."""
    path, temporary = Path(path), Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e: # torch's writer raises RuntimeError instead of OSError
        full = getattr(e, 'errno', None) == errno.ENOSPC or shutil.disk_usage(path.parent).free < 2 ** 20
        reason = 'the disk is full' if full else str(e).splitlines()[0]
        raise OSError(f"{path} could not be written: {reason}") from e
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix': # also makes the rename survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. OSError or ValueError if the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"there is no checkpoint {path}: train one first, or check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip(): # verifies every CRC-32, which torch.load does not
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint['model'].keys(), checkpoint['model_args'].keys() # it must have both
    except Exception as e: # a damaged file can raise anything
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        others = [str(p) for p in sorted(path.parent.glob('*.pt')) if p != path and zipfile.is_zipfile(p)]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use another one, here "
                         f"{', '.join(others) or 'there is none'}") from e
    return checkpoint


def find_weights(name):
    """The path that init_from names, here or in the project. For a run's folder: its best checkpoint."""
    path = find_path(name)
    return next((p for p in (path / 'best.pt', path / 'ckpt.pt') if p.exists()), path)


def open_weights(name):
    """Trained weights as a checkpoint dict, with everything known about them. name: 'gpt2' to 'gpt2-xl' (downloaded
    once), a folder in Hugging Face's format, a run's folder, or a checkpoint.
    """
    path = find_weights(name)
    if name in GPT2_NAMES or path.is_dir():
        from data.export import open_hugging_face # that module imports this one
        return open_hugging_face(name if name in GPT2_NAMES else path)
    return load_checkpoint(path)


def stored_config(config):
    """The fields of a config that a checkpoint stores: nanoGPT's, and those that differ from the defaults."""
    # so a field may be deleted some day without breaking the checkpoints that left it at its default
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.name in NANOGPT_FIELDS or getattr(config, f.name) != f.default}


def mixers_of(args):
    mixer = args.get('mixer', 'attention')
    return mixer if isinstance(mixer, (tuple, list)) else [mixer]


def architecture(checkpoint):
    """The fields of GPTConfig that a checkpoint was trained with, even if a default has changed since."""
    args = checkpoint['model_args']
    read = [name for m in mixers_of(args) if m in MIXERS for name in own_settings(MIXERS[m])]
    known = [f.name for f in fields(GPTConfig) if f.name not in GPTConfig.declared_by or f.name in read]
    return {k: v for k, v in checkpoint.get('config', {}).items() if k in known} | args


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a model

def load_model(path, device='cpu', **changes):
    """Loads the weights that open_weights finds at path. Returns (model in evaluation mode, checkpoint dict), and
    prints what the changes, as in build_model, add.
    """
    checkpoint = open_weights(path)
    try:
        model, added = build_model(architecture(checkpoint), checkpoint['model'], **changes)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    for line in added:
        print(f"added    {line}")
    return model.to(device).eval(), checkpoint


def build_model(args, state, allow_changes=False, **changes):
    """Builds GPT(GPTConfig(**args)) with the weights in state. Returns (model, a line for each addition). changes may
    set fields that do not change what the weights mean: dropout, block_size, additions that start as the identity, and
    time_mixing, which has no identity and must be trained in. Others are refused unless allow_changes.
    """
    lost = [name for name in mixers_of(args) if name not in MIXERS]
    if lost:
        raise ValueError(f"the mixer {lost[0]!r} of the checkpoint is not in model.py: give the file that defines it, "
                         f"as in python train.py or sample.py config/mixers/{lost[0]}.py")
    defaults = vars(GPTConfig())
    # features that this model.py lacks; a field that is off does not matter
    unknown = sorted(k for k, v in args.items() if k not in defaults and v and v != 'none')
    if unknown:
        raise ValueError(f"the checkpoint's architecture has {first_few(unknown)}, which this model.py lacks")
    args = defaults | {k: v for k, v in args.items() if k in defaults}
    additions = {'time_weighting', 'bias', 'tie_weights', 'short_conv', 'value_residual', 'attention_gate'}
    safe = {'dropout', 'recompute', 'narrow_residual', 'block_size', 'time_mixing', *additions}
    if (args['pos_emb'], changes.get('pos_emb')) in (('none', 'relative'), ('learned', 'learned+relative')):
        safe.add('pos_emb')
    others = [f"{k}={v!r} instead of {args[k]!r}" for k, v in changes.items() if v != args[k] and k not in safe]
    if others and not allow_changes:
        way_out = "leave it as it was"
        with suppress(ValueError): # offered only if the weights fit
            build_model(args, state, True, **changes)
            way_out += ", or --allow_changes=True"
        raise ValueError(f"{first_few(others)} changes what the checkpoint's weights mean: {way_out}")
    config = args | changes
    model = GPT(GPTConfig(**config | dict(block_size=max(args['block_size'], config['block_size']))))
    grow = not additions.isdisjoint(changes) or 'pos_emb' in changes
    added = [f"{name}, starting as the identity" for name in load_weights(model, state, grow)]
    if config['time_mixing'] != args['time_mixing']:
        added.append(f"time_mixing={config['time_mixing']}, which has no identity: the logits change")
    return crop_block_size(model, config['block_size']), added


def load_weights(model, state, grow=False):
    """Loads a state dict by name: this project's, nanoGPT's or GPT-2's, whatever wrappers they were saved in. With
    grow=True, parameters that start as the identity may be missing; returns their names. Anything else that does not
    fit raises ValueError with the list.
    """
    own, tied = model.state_dict(), model.config.tie_weights
    if tied:
        del own['lm_head.weight'] # the embedding's
    n, state = len(state), {own_name(k): v for k, v in state.items()}
    if len(state) < n:
        raise ValueError("two of the checkpoint's parameters have the same name but for a prefix, such as module.")
    # old checkpoints of GPT-2 hold causal masks under these names
    masks = {k for k, v in state.items()
             if k.endswith('.attn.masked_bias') or k.endswith('.attn.bias') and v.dim() == 4}
    state = {k: v for k, v in state.items() if k in own or k not in masks}
    matrices = [state[k] for k in TIED if k in state]
    state = {k: v for v in matrices[:1] for k in TIED} | state # of two tied ones a file may have either
    if tied and matrices:
        if not torch.equal(*(matrix.nan_to_num(-1e30) for matrix in (matrices[0], matrices[-1]))): # nan is nan
            raise ValueError("the checkpoint's head differs from its embedding: set tie_weights=False")
        del state['lm_head.weight']
    surplus, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    if surplus:
        raise ValueError(f"the checkpoint has parameters that this architecture lacks: {first_few(surplus)}")
    identity = ('.attn.relative', '.attn.weight', '.attn.alpha', '.attn.beta', '.attn.share', '.attn.gate',
                '.conv.weight', '.bias')
    lost = [k for k in missing if not (grow and k.endswith(identity))]
    if lost:
        raise ValueError(f"the checkpoint lacks parameters that this architecture has: {first_few(lost)}")
    wrong = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if v.shape != own[k].shape]
    if wrong:
        raise ValueError(f"the checkpoint's parameters have other shapes than this architecture's: {first_few(wrong)}; "
                         "a block_size beyond the checkpoint's needs an architecture without tables of positions")
    for k, v in state.items():
        own[k].copy_(v)
    return missing


def own_name(name):
    """A parameter's name without what torch.compile, DDP and GPT2LMHeadModel put before it, in any order."""
    name = re.sub(r'^((_orig_mod|module|transformer)\.)+', '', name).replace('._orig_mod.', '.')
    return re.sub(r'^(?=(wte|wpe|h|ln_f)\.)', 'transformer.', name)


def crop_block_size(model, block_size):
    """The model with every table along time cropped to block_size, e.g. to start from GPT-2's 1024 and train at 256."""
    if block_size > model.config.block_size:
        raise ValueError(f"block_size={block_size} is longer than the {model.config.block_size} positions of these "
                         f"weights: use block_size={model.config.block_size} or less")
    if block_size == model.config.block_size:
        return model
    cropped, old = GPT(replace(model.config, block_size=block_size)), model.state_dict()
    for k, v in cropped.state_dict().items():
        v.copy_(old[k][tuple(slice(n) for n in v.shape)])
    return cropped


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run

@dataclass(eq=False)
class State:
    """Everything that training changes: the network, the optimizer, the scaler for float16, and counters. A checkpoint
    stores and restores it as a whole.
    """
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0 # steps done
    samples: int = 0 # sequences in these steps
    tokens: int = 0
    seconds: float = 0.0 # training time, without evaluations
    best_val_loss: float = math.inf
    best_step: int = 0 # the step of that loss
    evals_since_best: int = 0
    evaluated: int = -1 # the step of the last evaluation
    mark: str = '' # identifies the windows that best_val_loss was measured on

    def __post_init__(self):
        self.first_step, self.first_samples = self.step, self.samples # of this process

    def count(self, samples, length):
        """Counts a finished step."""
        self.step, self.samples, self.tokens = self.step + 1, self.samples + samples, self.tokens + samples * length

    def judge_by(self, mark):
        """Forgets the best loss if it was measured on other validation windows. Returns notes to print."""
        before, self.mark = self.mark, mark
        if before in ('', mark):
            return []
        self.best_val_loss, self.best_step, self.evals_since_best, self.evaluated = math.inf, 0, 0, -1
        return ["note     the validation data or windows have changed: the best loss so far is forgotten"]

    def keep_score(self, loss):
        """Records an evaluation. Returns whether its loss is the best, or the best one repeated after resuming."""
        better = loss < self.best_val_loss or loss == self.best_val_loss and self.step == self.best_step
        self.evaluated, self.evals_since_best = self.step, 0 if better else self.evals_since_best + 1
        if better:
            self.best_val_loss, self.best_step = loss, self.step
        return better

    def to_checkpoint(self, config, meta):
        """The dict to save. If the weights are sharded, all processes must call this."""
        weights, moments = full_state(self.model, self.optimizer)
        counters = {f.name: getattr(self, f.name) for f in fields(self)[3:]}
        return dict(format=3, model=weights, optimizer=moments, scaler=self.scaler.state_dict(), state=counters,
                    model_args=stored_config(self.model.config), config=config, meta=meta,
                    iter_num=self.step, best_val_loss=self.best_val_loss) # as nanoGPT's readers expect them

    def restore(self, checkpoint, config):
        """Restores all but the weights, also from nanoGPT's checkpoints. Returns notes to print."""
        if 'optimizer' not in checkpoint:
            raise ValueError("the checkpoint has no optimizer state, so it cannot be resumed: start a new run from "
                             "its weights, --init_from=FOLDER")
        notes, before = [], checkpoint['config'].get('block_size', config['block_size'])
        vars(self).update(stored_state(checkpoint, config))
        measured = ('dataset', 'eval_iters', 'eval_tokens', 'batch_size', 'block_size')
        if any(checkpoint['config'].get(name, config.get(name)) != config.get(name) for name in measured):
            self.mark = self.mark or 'other settings' # nanoGPT's have none
        if config['sampling'] == 'epoch' and before != config['block_size']: # epochs are counted in windows
            self.samples = self.samples * before // config['block_size']
            notes.append("note     block_size has changed within an epoch, so its windows are different now: some "
                         "tokens may be used twice")
        if config['decay_lr'] and config['lr_decay_iters'] < config['max_iters']:
            notes.append(f"note     the learning rate stays at min_lr from step {config['lr_decay_iters']} on: to "
                         f"extend its decay, --lr_decay_iters={config['max_iters']}")
        self.first_step, self.first_samples = self.step, self.samples
        self.scaler.load_state_dict(checkpoint.get('scaler') or self.scaler.state_dict())
        load_optimizer(self.model, self.optimizer, checkpoint['optimizer'], architecture(checkpoint))
        return notes


def stored_state(checkpoint, config):
    """The counters of State, also from nanoGPT's checkpoints."""
    if 'state' in checkpoint:
        return checkpoint['state']
    step, config = checkpoint['iter_num'], config | checkpoint['config']
    samples = step * config['gradient_accumulation_steps'] * config['batch_size']
    return dict(step=step, samples=samples, tokens=samples * config['block_size'],
                best_val_loss=float(checkpoint['best_val_loss']), best_step=step)


def is_sharded(model):
    return hasattr(model.lm_head.weight, 'full_tensor')


def full_state(model, optimizer):
    """The state dicts of a model and its optimizer, as for one process. If sharded, complete on rank 0 only."""
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return weights, numbered(moments.get('state', {}), moments.get('param_groups', ()))


def numbered(state, groups):
    """An optimizer's state dict, in which numbers stand for the parameters' names."""
    index = {name: i for i, name in enumerate(name for group in groups for name in group['params'])}
    return dict(state={index[name]: moments for name, moments in state.items()},
                param_groups=[group | dict(params=[index[name] for name in group['params']]) for group in groups])


def load_optimizer(model, optimizer, stored, args):
    """Loads an optimizer state dict that was saved with a model of GPTConfig(**args). Moments are matched to parameters
    by name and cropped like them; added parameters start without. The settings of the groups are left unchanged.
    """
    with torch.device('meta'):
        before = GPT(GPTConfig(**{f.name: args[f.name] for f in fields(GPTConfig) if f.name in args}))
    # in the order of the groups; nanoGPT's two groups give the same order
    names = [name for group in optimizer_groups(before).values() for name, _ in group]
    indices = [i for group in stored['param_groups'] for i in group['params']]
    moments = {name: stored['state'][i] for name, i in zip(names, indices) if i in stored['state']}
    cuts = {name: tuple(map(slice, p.shape)) for name, p in model.named_parameters()}
    moments = {name: {key: v[cuts[name]].contiguous() if v.dim() == len(cuts[name]) else v # AdamW's kernel reads them
                      for key, v in state.items()} for name, state in moments.items() if name in cuts} # as they lie
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = [group | dict(params=[name_of[id(p)] for p in group['params']]) for group in optimizer.param_groups]
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
        set_optimizer_state_dict(model, optimizer, dict(state=moments, param_groups=groups),
                                 options=StateDictOptions(full_state_dict=True))
        return
    optimizer.load_state_dict(numbered(moments, groups))
