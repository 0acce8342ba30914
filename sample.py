"""
Generates text from a checkpoint. From any directory:

    python sample.py --out_dir=out-quick                              a few samples of the run in that folder
    python sample.py --out_dir=out-quick --start="def main" --temperature=0
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt      OpenAI's weights, the prompt from a file
    echo "Once upon" | python sample.py --init_from=gpt2 --start=-    the prompt from standard input
    python sample.py --out_dir=out-quick --interactive=True           a chat: /reset forgets it, Ctrl-D ends it
"""
import codecs
import os
import sys
from pathlib import Path

import torch

from configurator import configure, exit_on_error
from data.tokens import dataset_folder, load_meta, load_tokenizer
from model import GPT, resolve

# ---------------------------------------------------------------------------------------------------------------------
# where the weights come from
out_dir = 'out' # a run's folder; read if init_from is 'resume'
init_from = 'resume' # resume | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint | a folder in Hugging Face's layout
checkpoint = 'best' # best (best.pt, or ckpt.pt where there is none) | latest (ckpt.pt)
dataset = '' # whose tokenizer a checkpoint of nanoGPT's needs; '': the one in data/ that it names, or GPT-2's
# what is generated
start = '\n' # the prompt; FILE:path reads it from a file, - from standard input
num_samples = 10
max_new_tokens = 500 # in each sample or answer
temperature = 0.8 # 0 takes the most likely token, below 1 is less random, above 1 more
top_k: int | None = 200 # keep only the k most likely tokens; None: all
top_p = 1.0 # keep only the most likely tokens that together have this probability
min_p = 0.0 # keep only tokens with at least this share of the most likely one's probability
repetition_penalty = 1.0 # above 1: tokens that are in the context already become less likely
repetition_window: int | None = None # how many of the last tokens that looks at; None: block_size
no_repeat_ngram = 0 # no n tokens in a row come twice within that window; 0: they may
beams = 1 # above 1: the best text that a beam search finds, instead of drawing at random
length_penalty = 1.0 # of a beam search: above 0 favours longer texts
stop: tuple[str, ...] = () # strings that end a sample, separated by commas; they are not printed
special = False # print special tokens such as <|endoftext|>, and go on after them
seed = 1337
# chat
interactive = False # a conversation on the terminal instead of samples
user_prefix = '\nYou: ' # stands before what you write
bot_prefix = '\nGPT: ' # stands before the answers
# machine
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto' # auto | float32 | bfloat16 | float16
compile = False # torch.compile; whether it pays here is not measured
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

def load():
    """-> (model, tokenizer), and says where they are from."""
    project = Path(__file__).resolve().parent
    path = next((p for p in (Path(init_from).expanduser(), project / init_from) if p.exists()), Path(init_from))
    if init_from in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or (path / 'model.safetensors').is_file():
        print(f"{init_from}, pretrained", file=sys.stderr)
        return GPT.from_pretrained(path, dict(dropout=0.0)).eval(), load_tokenizer(dict(tokenizer='tiktoken', encoding='gpt2'))
    if init_from == 'resume':
        if checkpoint not in ('best', 'latest'):
            raise ValueError(f"checkpoint={checkpoint!r} is neither 'best' nor 'latest'; for a file use --init_from=PATH")
        path = project / os.path.expanduser(out_dir) / ('best.pt' if checkpoint == 'best' else 'ckpt.pt')
        if not path.is_file() and checkpoint == 'best':
            path = path.with_name('ckpt.pt')
    model, ckpt = GPT.load(path)
    meta = ckpt.get('meta')
    if meta is None: # nanoGPT's checkpoint: its dataset has the tokenizer, or it is GPT-2's
        named = Path(str(ckpt.get('config', {}).get('dataset', ''))).name # a name in data/, never a path out of it
        meta = load_meta(dataset_folder(dataset or named))
        meta = meta if 'tokenizer' in meta else dict(tokenizer='tiktoken', encoding='gpt2')
    print(f"{path}: step {ckpt.get('iter_num', '?')}, best validation loss {float(ckpt.get('best_val_loss', 'nan')):.4f}",
          file=sys.stderr)
    tokenizer = load_tokenizer(meta)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, and the weights in {path} know "
                         f"{model.config.vocab_size}: this checkpoint belongs to another dataset")
    return model, tokenizer

def pieces(prompt, stops):
    """
    The text after the prompt's ids, piece by piece as it is generated. Ends before the first of stops, and at
    <|endoftext|> unless special tokens are shown.
    """
    ids = torch.tensor([prompt], device=device)
    decoder = codecs.getincrementaldecoder('utf-8')('replace') # a character may be several tokens
    held = '' # text that may be the beginning of a stop string
    control = dict(repetition_penalty=repetition_penalty, repetition_window=repetition_window, no_repeat_ngram=no_repeat_ngram,
                   vocab_size=tokenizer.vocab_size)
    if beams > 1:
        tokens = model.beam_search(ids, max_new_tokens, beams, length_penalty, eot=None if special else tokenizer.eot, **control)[0, len(prompt):]
    else:
        tokens = model.stream(ids, max_new_tokens, temperature, top_k, top_p, min_p=min_p, generator=generator, **control)
    for token in tokens:
        token = token.item()
        if token == tokenizer.eot and not special:
            break
        held += decoder.decode(tokenizer.decode_bytes([token], special=special))
        found = [held.index(s) for s in stops if s in held]
        if found:
            yield held[:min(found)]
            return
        keep = max((n for s in stops for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    yield held + decoder.decode(b'', final=True)

def show(text):
    """Prints at once, and says what a terminal cannot show with ? instead of failing."""
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'replace').decode(encoding), end='', flush=True)

def chat():
    """The history is text; as much of its end is read as leaves room for an answer."""
    history = ''
    room = model.config.block_size - min(max_new_tokens, model.config.block_size // 2)
    stops = [s for s in (*stop, user_prefix.strip()) if s]
    while True:
        try:
            line = input(user_prefix.lstrip('\n') if sys.stdin.isatty() else '')
        except EOFError:
            print()
            return
        if line.strip() == '/reset':
            history = ''
            print('(forgotten)')
            continue
        try:
            prompt = tokenizer.encode(history + user_prefix + line + bot_prefix)[-room:]
        except ValueError as e: # characters that the vocabulary lacks: only this line is lost
            print('error:', e, file=sys.stderr)
            continue
        if not prompt:
            continue
        show(bot_prefix.lstrip('\n'))
        answer = ''
        for text in pieces(prompt, stops):
            text = text if answer else text.lstrip()
            answer += text
            show(text)
        show('\n')
        history += user_prefix + line + bot_prefix + answer.rstrip()

with torch.inference_mode(), exit_on_error(): # faster by a few percent than no_grad where a token takes a millisecond
    for name, right, rule in [('temperature', temperature >= 0, 'at least 0'), ('top_k', top_k is None or top_k > 0, 'at least 1, or None'),
                              ('top_p', 0 < top_p <= 1, 'above 0 and at most 1'), ('num_samples', num_samples > 0, 'at least 1'),
                              ('min_p', 0 <= min_p <= 1, 'from 0 to 1'), ('repetition_penalty', repetition_penalty > 0, 'above 0'),
                              ('no_repeat_ngram', no_repeat_ngram >= 0, 'at least 0'), ('beams', beams > 0, 'at least 1'),
                              ('max_new_tokens', max_new_tokens > 0, 'at least 1')]:
        if not right:
            raise ValueError(f"{name}={globals()[name]!r} must be {rule}")
    automatic, (device, dtype) = dtype == 'auto', resolve(device, dtype)
    if start == '-':
        start = sys.stdin.read()
    elif start.startswith('FILE:'):
        try:
            start = Path(os.path.expanduser(start[5:])).read_text(encoding='utf-8')
        except UnicodeDecodeError as e:
            raise ValueError(f"{start[5:]} is not UTF-8 at byte {e.start}: save it as UTF-8") from None
    model, tokenizer = load()
    if repetition_window is not None and not 1 <= repetition_window <= model.config.block_size:
        raise ValueError(f"repetition_window={repetition_window} must be from 1 to this model's block_size={model.config.block_size}")
    if automatic and torch.device(device).type == 'cpu' and model.get_num_params() < 5e7:
        dtype = 'float32' # as fast: only large weights are worth halving
    model.to(device, getattr(torch, dtype))
    if compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    generator = torch.Generator(device).manual_seed(seed)
    if interactive:
        chat()
        sys.exit(0)
    prompt = tokenizer.encode(start)
    if not prompt:
        if tokenizer.eot is None:
            raise ValueError("the prompt is empty: give one with --start")
        prompt = [tokenizer.eot]
    for _ in range(num_samples):
        show(start)
        for text in pieces(prompt, [s for s in stop if s]):
            show(text)
        show('\n---------------\n')
