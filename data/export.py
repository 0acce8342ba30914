"""
Hugging Face's layout, in and out: GPT-2's weights are read from a folder, and a model goes out as one from which
transformers' AutoModelForCausalLM and AutoTokenizer give the same logits and ids.

What GPT-2's class can express goes out as GPT-2. Everything else takes its code along: model.py, data/modeling_gpt.py
and the files of its mixers, which transformers executes with trust_remote_code=True.
"""
import copy
import inspect
import json
import re
import tempfile
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from data.checkpoints import GPT2_NAMES, stored_config
from data.tokenizers import (EOT, GPT2, CharTokenizer, JsonTokenizer, TiktokenTokenizer, import_tokenizers,
                             tokenizer_of)
from data.tokens import first_few
from model import BUILT_IN, MIXERS, GPTConfig

PROJECT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# In: a folder with config.json and the weights

# GPT-2's Conv1D holds a Linear's matrix transposed
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# the first of these that a folder has counts; an index lists the shards of larger weights
WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
MLP_OF_ACTIVATION = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu', relu2='relu2')
ACTIVATION_OF_MLP = dict(gelu_tanh='gelu_new', gelu='gelu', relu2='relu2')


def open_hugging_face(name):
    """
    GPT-2 by name (downloaded once), or a folder in Hugging Face's layout, as a checkpoint's dict. OSError or ValueError
    say what is wrong with it.
    """
    folder = download(name) if name in GPT2_NAMES else Path(name)
    config, weights = needed(folder, 'config.json'), needed(folder, *WEIGHTS)
    with damage_in_words(folder):
        hf = dict(json.loads(config.read_text(encoding='utf-8-sig')))
    args = args_of_hugging_face(hf, folder)
    with damage_in_words(folder):
        state = {k: v.t() if k.endswith(CONV1D) else v.detach() for k, v in read_weights(weights).items()}
    return dict(model=state, model_args=args, meta=GPT2 if name in GPT2_NAMES else tokenizer_of(folder))


def needed(folder, *names):
    """The path of the first of these files that the folder has. OSError says what it has instead."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        others = first_few(sorted(path.name for path in folder.iterdir()))
        others = f'but {others}' if others else 'and nothing else'
        raise OSError(f"{folder} has no {' or '.join(names)}, {others}: expected {', '.join(GPT2_NAMES)}, a run's "
                      f"folder with best.pt or ckpt.pt, or one with config.json and {' or '.join(WEIGHTS[::2])}")
    return found[0]


@contextmanager
def damage_in_words(folder):
    """Whatever a parser raises on a damaged file becomes a ValueError."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as e:
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        raise ValueError(f"{folder} is not readable as GPT-2 in Hugging Face's layout: {reason}") from e


def read_weights(path):
    """The tensors by name in a file, or in all those that an .index.json lists. Executes nothing."""
    if path.suffix == '.json':
        shards = sorted(set(json.loads(path.read_text(encoding='utf-8'))['weight_map'].values()))
        parts = [read_weights(needed(path.parent, Path(shard).name)) for shard in shards]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file # here: only those who load it need it
        return load_file(path)
    return torch.load(path, 'cpu', weights_only=True)


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
    if lost := {'n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size'} - hf.keys():
        raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(lost))}: get it again")
    C = hf['n_embd']
    return dict(n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=C, block_size=hf['n_positions'],
                vocab_size=hf['vocab_size'], mlp=MLP_OF_ACTIVATION[activation],
                mlp_ratio=(hf.get('n_inner') or 4 * C) / C, tie_weights=hf.get('tie_word_embeddings', True),
                dropout=hf.get('resid_pdrop', 0.1))


# ---------------------------------------------------------------------------------------------------------------------
# Out

def export(model, tokenizer, folder):
    """Writes the folder -> (whether it needs its own code, the largest deviation of the logits; None: not checked)."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export={str(folder)!r} is not empty: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder.parent) as parent: # whole, or not there at all
        new = Path(parent) / re.sub(r'\W', '_', folder.name) # transformers makes a module of it
        new.mkdir()
        with_code = False
        try:
            save_pretrained(model, new, tokenizer.meta())
        except ValueError: # what GPT-2 lacks
            with_code = True
            save_with_code(model, new)
        config = json.loads((new / 'config.json').read_text(encoding='utf-8'))
        config |= dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot) # where generate stops
        write_json(new / 'config.json', config)
        if tokenizer.name != 'pictures': # which are no text
            save_tokenizer(tokenizer, new, model.config.block_size)
        deviation = check(model, new)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    return with_code, deviation


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def save_with_code(model, folder):
    """config.json, model.safetensors and the code."""
    from safetensors.torch import save_file
    c = model.config
    state = {f'gpt.{k}': v.detach().cpu().contiguous() for k, v in model.state_dict().items()
             if k != 'transformer.wte.weight' or not c.tie_weights} # of two tied ones, the head
    config = dict(architectures=['ModelForCausalLM'], model_type='gpt_with_mixers',
                  auto_map=dict(AutoConfig='modeling_gpt.ModelConfig',
                                AutoModelForCausalLM='modeling_gpt.ModelForCausalLM'),
                  gpt=stored_config(c), vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
                  num_attention_heads=c.n_head, tie_word_embeddings=c.tie_weights, use_cache=True,
                  torch_dtype=str(model.lm_head.weight.dtype).removeprefix('torch.'))
    if model.bounded: # harnesses cut what is longer
        config['max_position_embeddings'] = c.block_size
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    write_json(folder / 'config.json', config)

    lines = []
    for cls in dict.fromkeys(c.mixers()):
        if cls not in [MIXERS[name] for name in BUILT_IN]:
            source = Path(inspect.getsourcefile(cls))
            name = re.sub(r'\W', '_', f'mixer_{source.stem}')
            code = re.sub(r'^from model import', 'from .model import', source.read_text(encoding='utf-8'), flags=re.M)
            (folder / f'{name}.py').write_text(code, encoding='utf-8')
            lines.append(f'from .{name} import {cls.__name__}\nadd_mixer({cls.__name__})')
    code = (PROJECT / 'data/modeling_gpt.py').read_text(encoding='utf-8').replace('# the mixers\' files',
                                                                                  '\n'.join(lines))
    (folder / 'modeling_gpt.py').write_text(code, encoding='utf-8')
    # transformers looks for what a file imports, in functions too, and this one stays here
    code = (PROJECT / 'model.py').read_text(encoding='utf-8')
    code = re.sub(r'^( +)from data\.\w+ import \w+$', r'\1raise NotImplementedError', code, flags=re.M)
    (folder / 'model.py').write_text(code, encoding='utf-8')


def as_fast(tokenizer):
    """A Tokenizer of Hugging Face's library with the same ids. Of the special tokens only eot is one."""
    library = import_tokenizers()
    models, pre, decoders = library.models, library.pre_tokenizers, library.decoders
    if isinstance(tokenizer, JsonTokenizer): # without what would add tokens that training never saw, or cut
        return library.Tokenizer.from_str(json.dumps(tokenizer.parts | dict(post_processor=None, truncation=None,
                                                                            padding=None)))
    if isinstance(tokenizer, TiktokenTokenizer):
        try:
            from transformers.convert_slow_tokenizer import TikTokenConverter
        except ImportError:
            raise ValueError(f"export={tokenizer.name}'s vocabulary needs transformers: pip install transformers"
                             ) from None
        encoding = tokenizer.encoding
        with tempfile.NamedTemporaryFile('w', suffix='.tiktoken') as file: # in tiktoken's own format
            for token, rank in encoding._mergeable_ranks.items():
                file.write(f'{b64encode(token).decode()} {rank}\n')
            file.flush()
            fast = TikTokenConverter(file.name, encoding._pat_str, extra_special_tokens={}).converted()
        others = range(fast.get_vocab_size(), tokenizer.vocab_size)
        fast.add_special_tokens([EOT if i == tokenizer.eot else f'<|unused_{i}|>' for i in others])
        return fast
    if isinstance(tokenizer, CharTokenizer):
        fast = library.Tokenizer(models.WordLevel(tokenizer.ids, unk_token=None))
        fast.pre_tokenizer = pre.Split(library.Regex(r'[\s\S]'), 'isolated')
        fast.decoder = decoders.Fuse()
    else: # bytes, which the library writes as printable characters
        fast = library.Tokenizer(models.BPE(JsonTokenizer.byte_characters(), []))
        fast.pre_tokenizer, fast.decoder = pre.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if tokenizer.eot is not None:
        fast.add_special_tokens([EOT])
    return fast


def save_tokenizer(tokenizer, folder, block_size):
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer takes them."""
    fast = as_fast(tokenizer)
    fast.save(str(folder / 'tokenizer.json'))
    known = tokenizer.decode(range(min(256, tokenizer.vocab_size))) # some text that it can write
    text = known + (tokenizer.special[tokenizer.eot] if tokenizer.eot is not None else '') + known[::-1]
    expected = tokenizer.encode(known) + [tokenizer.eot] * (tokenizer.eot is not None) + tokenizer.encode(known[::-1])
    if fast.encode(text, add_special_tokens=False).ids != expected:
        raise ValueError("this tokenizer cannot be written as a tokenizer.json with the same ids")
    end = tokenizer.special.get(tokenizer.eot)
    config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                  model_max_length=block_size)
    if end: # as GPT-2's, it begins and ends
        config |= dict(bos_token=end, eos_token=end)
    write_json(folder / 'tokenizer_config.json', config)


@torch.no_grad()
def check(model, folder):
    """The largest difference of the logits that transformers computes from the folder; None if it is not there."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().float()
    own = copy.deepcopy(model).cpu().float()
    idx = torch.randint(own.config.vocab_size, (2, min(64, own.config.block_size)),
                        generator=torch.Generator().manual_seed(0))
    expected = own(idx)[0]
    deviation = (other(input_ids=idx).logits - expected).abs().max().item()
    if not deviation < 1e-3 * expected.std().item() + 1e-4:
        raise ValueError(f"what transformers reads from {folder} differs from the model, its logits by {deviation:.3g}:"
                         " that is a mistake in this project or in the mixer's file")
    return deviation


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
    config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocab_size,
                  n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                  layer_norm_epsilon=1e-5, n_inner=round(c.mlp_ratio * c.n_embd),
                  activation_function=ACTIVATION_OF_MLP[c.mlp], resid_pdrop=c.dropout, embd_pdrop=c.dropout,
                  attn_pdrop=c.dropout, tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None,
                  torch_dtype=str(model.lm_head.weight.dtype).removeprefix('torch.'))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    write_json(folder / 'config.json', config)
    if meta:
        write_json(folder / 'meta.json', meta)
