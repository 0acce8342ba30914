"""
Weights on disk: checkpoints, weights of another architecture, and GPT-2 in Hugging Face's layout.

A checkpoint is a dict of tensors and plain values in torch's own zip format. Opening one executes nothing.
"""
import errno
import json
import math
import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from data.tokens import find_path, load_meta
from model import GPT, MIXERS, GPTConfig, optimizer_groups, own_settings

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GPT2_TOKENIZER = dict(tokenizer='tiktoken', encoding='gpt2')
NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


# ---------------------------------------------------------------------------------------------------------------------
# Files

def save_checkpoint(path, checkpoint):
    """Replaces path in one step: whatever happens, a whole checkpoint has this name, the old one or the new."""
    path, temporary = Path(path), Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e: # torch's writer raises RuntimeError where Python's raises OSError
        full = getattr(e, 'errno', None) == errno.ENOSPC or shutil.disk_usage(path.parent).free < 2 ** 20
        reason = 'the disk is full' if full else str(e).splitlines()[0]
        raise OSError(f"{path} could not be written: {reason}") from e
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix': # the new name itself survives a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. OSError or ValueError say what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"there is no checkpoint {path}: train one first, or check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip(): # reads everything against its CRC-32, which torch.load does not
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        for part in ('model', 'model_args'):
            if not isinstance(checkpoint[part], dict):
                raise ValueError(f"its {part} is no dict")
    except Exception as e: # a damaged file can raise anything
        reason = f'it holds no {e}' if isinstance(e, KeyError) else str(e).split('\n')[0]
        others = [str(p) for p in sorted(path.parent.glob('*.pt')) if p != path and zipfile.is_zipfile(p)]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use another one, here "
                         f"{', '.join(others) or 'there is none'}") from e
    return checkpoint


def find_weights(name):
    """The path that init_from names, here or in the project. Of a run's folder: its best checkpoint."""
    path = find_path(name)
    return next((p for p in (path / 'best.pt', path / 'ckpt.pt') if p.exists()), path)


def open_weights(name):
    """
    Trained weights as a checkpoint's dict, with what else is known of them: 'gpt2' to 'gpt2-xl' (downloaded once), a
    folder in Hugging Face's layout, a run's folder, or a checkpoint.
    """
    path = download(name) if name in GPT2_NAMES else find_weights(name)
    if path.is_dir():
        return read_hugging_face(path) | dict(meta=GPT2_TOKENIZER if name in GPT2_NAMES else load_meta(path))
    checkpoint = load_checkpoint(path)
    # an EMA of the weights, as runs once had: it is what their losses are of. A tied head is the embedding
    average = checkpoint.pop('average', None) or {}
    if average:
        checkpoint['model'].pop('lm_head.weight', None)
    return checkpoint | dict(model=checkpoint['model'] | average)


def stored_config(config):
    """A config's fields as a checkpoint keeps them: nanoGPT's, and what differs from the defaults."""
    # a field that is left at its default may be deleted some day without locking the checkpoint out
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.name in NANOGPT_FIELDS or getattr(config, f.name) != f.default}


def architecture(checkpoint):
    """The fields of GPTConfig that a checkpoint was trained with, also where a default has changed since."""
    args = checkpoint['model_args']
    mixer = args.get('mixer', 'attention')
    read = [name for m in (mixer if isinstance(mixer, (tuple, list)) else [mixer]) if m in MIXERS
            for name in own_settings(MIXERS[m])]
    known = [f.name for f in fields(GPTConfig) if f.name not in GPTConfig.declared_by or f.name in read]
    return {k: v for k, v in checkpoint.get('config', {}).items() if k in known} | args


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a model

def load_model(path, device='cpu', **changes):
    """The weights that open_weights finds at path -> (model in evaluation mode, the checkpoint's dict)."""
    checkpoint = open_weights(path)
    try:
        model, _ = build_model(architecture(checkpoint), checkpoint['model'], **changes)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return model.to(device).eval(), checkpoint


def build_model(args, state, allow_changes=False, **changes):
    """
    A GPT of GPTConfig(**args) with the weights in state -> (model, a line for each addition). changes are fields that
    leave the weights their meaning: dropout, another block_size, additions that start as the identity, and
    time_mixing, which has no identity and must be trained in. Others are refused unless allow_changes.
    """
    mixer = args.get('mixer', 'attention')
    lost = [name for name in (mixer if isinstance(mixer, (tuple, list)) else [mixer]) if name not in MIXERS]
    if lost:
        raise ValueError(f"the mixer {lost[0]!r} of the checkpoint is not in model.py: give the file that defines it, "
                         f"as in python train.py or sample.py config/mixers/{lost[0]}.py")
    defaults = vars(GPTConfig())
    # what a model.py without the field cannot do; a field that is off says nothing
    unknown = sorted(k for k, v in args.items() if k not in defaults and v and v != 'none')
    if unknown:
        raise ValueError(f"the checkpoint's architecture has {first_few(unknown)}, which this model.py lacks")
    args = defaults | {k: v for k, v in args.items() if k in defaults}
    safe = {'dropout', 'recompute', 'narrow_residual', 'block_size', 'bias', 'tie_weights', 'time_mixing',
            'time_weighting'}
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
    grow = any(k in changes for k in ('time_weighting', 'pos_emb', 'bias', 'tie_weights'))
    added = [f"{name}, starting as the identity" for name in load_weights(model, state, grow)]
    if config['time_mixing'] != args['time_mixing']:
        added.append(f"time_mixing={config['time_mixing']}, which has no identity: the logits change")
    return crop_block_size(model, config['block_size']), added


def load_weights(model, state, grow=False):
    """
    Loads a state dict by name: this project's, nanoGPT's or GPT-2's. With grow=True, parameters that start as the
    identity may be missing; returns their names. Anything else that does not fit raises ValueError with the list.
    """
    own, tied = model.state_dict(), model.config.tie_weights
    if tied:
        del own['lm_head.weight'] # the embedding's
    state = {k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in state.items()}
    # old checkpoints of GPT-2 hold causal masks under these names
    masks = {k for k, v in state.items()
             if k.endswith('.attn.masked_bias') or k.endswith('.attn.bias') and v.dim() == 4}
    state = {k: v for k, v in state.items() if k in own or k not in masks}
    wte, head = state.get('transformer.wte.weight'), state.get('lm_head.weight')
    if wte is not None and head is None and not tied:
        state['lm_head.weight'] = wte # untying starts from the tied matrix
    if tied and head is not None and wte is not None:
        if head.shape != wte.shape or not torch.equal(head, wte):
            raise ValueError("the checkpoint's head differs from its embedding: set tie_weights=False")
        del state['lm_head.weight']
    surplus, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    if surplus:
        raise ValueError(f"the checkpoint has parameters that this architecture lacks: {first_few(surplus)}")
    identity = ('.attn.relative', '.attn.weight', '.attn.alpha', '.attn.beta', '.bias')
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


def crop_block_size(model, block_size):
    """The model with every table along time shortened to block_size: start from GPT-2's 1024 and train at 256."""
    if block_size > model.config.block_size:
        raise ValueError(f"block_size={block_size} is longer than the {model.config.block_size} positions of these "
                         f"weights: use block_size={model.config.block_size} or less")
    if block_size == model.config.block_size:
        return model
    weight = model.lm_head.weight
    with weight.device:
        cropped = GPT(replace(model.config, block_size=block_size)).to(weight.dtype)
    old = model.state_dict()
    for k, v in cropped.state_dict().items():
        v.copy_(old[k][tuple(slice(n) for n in v.shape)])
    return cropped.train(model.training)


def first_few(names, most=8):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ', '.join(names[:most]) + more


# ---------------------------------------------------------------------------------------------------------------------
# Where a run is

@dataclass(eq=False)
class State:
    """
    What training changes: the network, the optimizer, float16's scaler, and how far the run is. A checkpoint stores and
    restores it as a whole.
    """
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0 # steps done
    samples: int = 0 # sequences in them
    tokens: int = 0
    seconds: float = 0.0 # of training, without evaluations
    best_val_loss: float = math.inf
    best_step: int = 0 # of that loss
    evals_since_best: int = 0
    evaluated: int = -1 # the step that was last evaluated

    def __post_init__(self):
        self.first_step, self.first_samples = self.step, self.samples # of this process

    def count(self, samples, length):
        """A step is done."""
        self.step, self.samples, self.tokens = self.step + 1, self.samples + samples, self.tokens + samples * length

    def keep_score(self, loss):
        """Of an evaluation's loss: whether it is the best so far, or that one again, as a resumed run repeats it."""
        better = loss < self.best_val_loss or loss == self.best_val_loss and self.step == self.best_step
        self.evaluated, self.evals_since_best = self.step, 0 if better else self.evals_since_best + 1
        if better:
            self.best_val_loss, self.best_step = loss, self.step
        return better

    def to_checkpoint(self, config, meta):
        """The dict to save. Where fully_shard shares out the weights, all processes must call."""
        weights, moments = full_state(self.model, self.optimizer)
        counters = {f.name: getattr(self, f.name) for f in fields(self)[3:]}
        return dict(format=3, model=weights, optimizer=moments, scaler=self.scaler.state_dict(), state=counters,
                    model_args=stored_config(self.model.config), config=config, meta=meta,
                    iter_num=self.step, best_val_loss=self.best_val_loss) # as nanoGPT's readers expect them

    def restore(self, checkpoint, config):
        """All but the weights, also of checkpoints of nanoGPT and of earlier versions."""
        vars(self).update(stored_state(checkpoint, config))
        self.first_step, self.first_samples = self.step, self.samples
        self.scaler.load_state_dict(checkpoint.get('scaler') or self.scaler.state_dict())
        load_optimizer(self.model, self.optimizer, checkpoint['optimizer'], architecture(checkpoint))


def stored_state(checkpoint, config):
    """The counters of State, also from nanoGPT's checkpoints, and from those of before there was a State."""
    if 'state' in checkpoint:
        return checkpoint['state']
    step, config = checkpoint['iter_num'], config | checkpoint.get('config', {})
    samples = checkpoint.get('samples', step * config['gradient_accumulation_steps'] * config['batch_size'])
    return dict(step=step, samples=samples, tokens=checkpoint.get('tokens', samples * config['block_size']),
                seconds=checkpoint.get('seconds', 0.0), best_val_loss=float(checkpoint['best_val_loss']),
                best_step=step, evals_since_best=checkpoint.get('stale', 0))


def is_sharded(model):
    return hasattr(model.lm_head.weight, 'full_tensor')


def full_state(model, optimizer):
    """The state dicts of a model and its optimizer as one process would have them; of shared ones on rank 0 alone."""
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    groups = moments.get('param_groups', ())
    index = {name: i for i, name in enumerate(name for group in groups for name in group['params'])}
    return weights, dict(state={index[name]: state for name, state in moments.get('state', {}).items()},
                         param_groups=[group | dict(params=[index[name] for name in group['params']])
                                       for group in groups])


def load_optimizer(model, optimizer, stored, args):
    """
    Loads an optimizer's plain state dict, which was saved with a model of GPTConfig(**args). Moments follow their
    parameters by name: shortened as these are, and none for one that was added. The groups' settings stay as they are.
    """
    with torch.device('meta'):
        before = GPT(GPTConfig(**{f.name: args[f.name] for f in fields(GPTConfig) if f.name in args}))
    # in the order of the groups. nanoGPT's two have the same order
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
    index = {name: i for i, name in enumerate(name for group in groups for name in group['params'])}
    groups = [group | dict(params=[index[name] for name in group['params']]) for group in groups]
    optimizer.load_state_dict(dict(state={index[name]: state for name, state in moments.items()}, param_groups=groups))


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout: a folder with config.json and model.safetensors

# GPT-2's Conv1D holds a Linear's matrix transposed
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
MLP_OF_ACTIVATION = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu', relu2='relu2')
ACTIVATION_OF_MLP = dict(gelu_tanh='gelu_new', gelu='gelu', relu2='relu2')


def read_hugging_face(folder):
    """A folder in Hugging Face's layout as a checkpoint's dict. OSError or ValueError say what is wrong with it."""
    for file in ('config.json', 'model.safetensors'):
        if not (folder / file).is_file():
            raise OSError(f"{folder} has no {file}: expected {', '.join(GPT2_NAMES)} or a folder with config.json and "
                          "model.safetensors")
    try:
        from safetensors.torch import load_file # here: only those who load it need it
        hf = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        state = load_file(folder / 'model.safetensors')
    except Exception as e: # whatever the parsers raise on a damaged file
        raise ValueError(f"{folder} is not readable as GPT-2 in Hugging Face's layout: {e}") from e
    # names without the prefix are how the hub has them
    state = {k if k.startswith(('transformer.', 'lm_head.')) else 'transformer.' + k: v for k, v in state.items()}
    state = {k: v.t() if k.endswith(CONV1D) else v for k, v in state.items()}
    return dict(model=state, model_args=args_of_hugging_face(hf, folder))


def download(name):
    """The folder of OpenAI's weights in Hugging Face's cache."""
    from huggingface_hub import hf_hub_download
    try:
        paths = [hf_hub_download(f'openai-community/{name}', file) for file in ('config.json', 'model.safetensors')]
    except Exception as e:
        raise OSError(f"{name} could not be downloaded from Hugging Face ({type(e).__name__}): check the network, or "
                      "give a local folder that has its config.json and model.safetensors") from e
    return Path(paths[0]).parent


def args_of_hugging_face(hf, folder):
    """GPTConfig's fields for the config.json of a GPT-2; ValueError for what this GPT cannot compute."""
    if hf.get('model_type') != 'gpt2':
        raise ValueError(f"{folder}/config.json has model_type {hf.get('model_type')!r}, and only 'gpt2' can be loaded")
    activation = hf.get('activation_function', 'gelu_new')
    if activation not in MLP_OF_ACTIVATION:
        raise ValueError(f"{folder}/config.json has activation_function {activation!r}: one of "
                         f"{', '.join(MLP_OF_ACTIVATION)} is needed")
    only = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    for field, value in only.items():
        if hf.get(field, value) != value:
            raise ValueError(f"{folder}/config.json has {field}={hf[field]}, and this GPT only has {value}")
    C = hf['n_embd']
    return dict(n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=C, block_size=hf['n_positions'],
                vocab_size=hf['vocab_size'], mlp=MLP_OF_ACTIVATION[activation],
                mlp_ratio=(hf.get('n_inner') or 4 * C) / C, tie_weights=hf.get('tie_word_embeddings', True),
                dropout=hf.get('resid_pdrop', 0.1))


def save_pretrained(model, folder, meta=None):
    """
    Writes config.json and model.safetensors as transformers' GPT2LMHeadModel has them, which gives the same logits.
    meta, a dataset's or checkpoint's, goes to meta.json: sample.py takes its tokenizer.
    """
    from safetensors.torch import save_file
    c = model.config
    # the fields that GPT-2's class has a place for
    plain = GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.recompute, c.bias,
                      c.tie_weights, mlp=c.mlp, mlp_ratio=c.mlp_ratio if c.mlp != 'none' else 4.0,
                      pos_emb=c.pos_emb if c.pos_emb == 'none' else 'learned', narrow_residual=c.narrow_residual)
    beyond = [f"{f.name}={getattr(c, f.name)!r}" for f in fields(c) if getattr(c, f.name) != getattr(plain, f.name)]
    if c.mlp not in ACTIVATION_OF_MLP:
        beyond.append(f"mlp={c.mlp!r}")
    if beyond:
        raise ValueError(f"Hugging Face's GPT-2 class cannot express {', '.join(beyond)}")
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if k != 'lm_head.weight' or not c.tie_weights}
    if c.pos_emb == 'none': # a position table of zeros
        state['transformer.wpe.weight'] = torch.zeros(c.block_size, c.n_embd)
    if not c.bias:
        state |= {k.removesuffix('weight') + 'bias': v.new_zeros(v.size(0)) for k, v in state.items()
                  if k.endswith('weight') and '.h.' in k or k == 'transformer.ln_f.weight'}
    state = {k: (v.t() if k.endswith(CONV1D) else v).contiguous() for k, v in state.items()}
    special = None if c.vocab_size <= 50256 else 50256 # another tokenizer's special tokens are not known here
    config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocab_size,
                  n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                  layer_norm_epsilon=1e-5, n_inner=round(c.mlp_ratio * c.n_embd),
                  activation_function=ACTIVATION_OF_MLP[c.mlp], resid_pdrop=c.dropout, embd_pdrop=c.dropout,
                  attn_pdrop=c.dropout, tie_word_embeddings=c.tie_weights, bos_token_id=special, eos_token_id=special,
                  torch_dtype=str(model.lm_head.weight.dtype).removeprefix('torch.'))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    for name, content in {'config.json': config, 'meta.json': meta}.items():
        if content:
            (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
