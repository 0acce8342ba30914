"""
Generates text from a checkpoint. From any directory:

    python sample.py --out_dir=out-quick                              a few samples of the run in that folder
    python sample.py --out_dir=out-quick --start="def main" --temperature=0
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt      OpenAI's weights, the prompt from a file
    echo "Once upon" | python sample.py --init_from=gpt2 --start=-    the prompt from standard input
    python sample.py --out_dir=out-quick --interactive=True           a chat: /help says how it goes
    python sample.py --out_dir=out-digits --num_samples=64            of pictures: samples.png in that folder
    python sample.py --out_dir=out-quick --export=FOLDER              weights, code and tokenizer for transformers
"""
import codecs
import gc
import math
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

from configurator import END_WITH_READER, answer_early, configure, explain_errors, settings_of, yield_if_busy

explain_errors()
answer_early('sample.py')
yield_if_busy()
gc.disable() # until the model is loaded: it would look through torch's million objects again and again
import torch

from data.checkpoints import GPT2_NAMES, find_weights, load_model
from data.machine import Machine
from data.tokenizers import GPT2, GPT2_SIZES, load_tokenizer, read_argument, read_text, tokenizer_of, with_line_ends
from data.tokens import dataset_folder, find_path
from model import Decoder, GPTConfig, add_mixer, beam_search, check_generation, finite, pack, to_int8

# ---------------------------------------------------------------------------------------------------------------------
# where the weights come from
out_dir = 'out' # a run's folder; read if init_from is 'resume'
init_from = 'resume' # resume | gpt2, gpt2-medium, gpt2-large, gpt2-xl | a checkpoint, a run's folder, or one in
    # Hugging Face's layout
checkpoint: Literal['best', 'latest'] = 'best' # best: best.pt, or ckpt.pt where there is none; latest: ckpt.pt
dataset = '' # whose tokenizer a checkpoint of nanoGPT's needs; '': the one in data/ that it names, or GPT-2's
# what is generated
# (in start, stop and the prefixes, \n is a line end and \\n the two characters)
start = '\n' # the prompt; FILE:path reads it from a file, - from standard input; of pictures: the number of a held-out
    # one, whose upper half is completed
num_samples = 10 # a beam search, which always finds the same text, prints one [1, inf)
max_new_tokens = 500 # in each sample or answer [1, inf)
temperature = 0.8 # 0 takes the most likely token, below 1 is less random, above 1 more [0, inf)
top_k: int | None = 200 # keep only the k most likely tokens; None: all [1, inf)
top_p = 1.0 # keep only the most likely tokens that together have this probability (0, 1]
min_p = 0.0 # keep only tokens with at least this fraction of the most likely one's probability [0, 1]
repetition_penalty = 1.0 # above 1: tokens that are in the context already become less likely (0, inf)
repetition_window: int | None = None # how many of the last tokens that looks at; None: block_size [1, inf)
no_repeat_ngram = 0 # no n tokens in a row come twice within that window; 0: they may [0, inf)
beams = 1 # above 1: the best text that a beam search finds, instead of drawing at random [1, inf)
length_penalty = 1.0 # of a beam search: above 0 favours longer texts [-30, 30]
stop: tuple[str, ...] = () # strings that end a sample, separated by commas; they are not printed
special = False # print special tokens such as <|endoftext|>, and go on after them
seed = 1337
# chat
interactive = False # a conversation on the terminal instead of samples
user_prefix = '\nYou: ' # stands before what you write
bot_prefix = '\nGPT: ' # stands before the answers
# instead of samples
export = '' # write the model and its tokenizer to this new folder, for transformers, and end
# machine
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto' # int8: weights of Linear layers, on a CPU:
    # half the bytes of bfloat16, and about a tenth faster for one sequence; eight at once are slower
compile = False # torch.compile; whether it pays here is not measured
# ---------------------------------------------------------------------------------------------------------------------
# a config file of training gives its mixer and its out_dir
settings = configure(globals(), adopt=add_mixer, foreign={*settings_of('train.py'), *vars(GPTConfig())})
explain_errors(settings.files)


def load():
    """-> (model, tokenizer), and says where they are from."""
    source = init_from
    if init_from == 'resume':
        source = find_weights(out_dir) if checkpoint == 'best' else find_path(out_dir) / 'ckpt.pt'
    elif init_from not in GPT2_NAMES:
        source = find_weights(init_from)
    model, stored = load_model(source, dropout=0.0)
    about = "pretrained"
    if 'iter_num' in stored:
        about = f"step {stored['iter_num']}, best validation loss {float(stored.get('best_val_loss', 'nan')):.4f}"
    print(f"{source}: {about}", file=sys.stderr)
    before = str(stored.get('config', {}).get('dataset', ''))
    # nanoGPT's checkpoints say nothing of the tokenizer, but their dataset may: a name in data/, never a path out of
    # it; this project's say what was known
    named = dataset or ('' if 'format' in stored else Path(before).name)
    settings.update(dataset=dataset or before)
    meta = stored.get('meta') or {}
    if 'tokenizer' not in meta and named:
        meta = tokenizer_of(dataset_folder(named))
    if 'tokenizer' not in meta and 'format' not in stored and model.config.vocab_size in GPT2_SIZES:
        meta = GPT2 # as nanoGPT takes its checkpoints
    tokenizer = load_tokenizer(meta)
    if tokenizer is None or tokenizer.vocab_size > model.config.vocab_size:
        what = f"{tokenizer.name!r} has {tokenizer.vocab_size}" if tokenizer else "is not known"
        raise ValueError(f"{source} has {model.config.vocab_size} ids, and its tokenizer {what}: name the dataset of "
                         "these weights by --dataset=NAME")
    return model, tokenizer


def read_prompt():
    """The text that --start gives or names."""
    if start == '-':
        return read_text(sys.stdin.buffer, 'standard input')
    if start.startswith('FILE:'):
        return read_text(os.path.expanduser(start[5:]))
    return with_line_ends(read_argument(start, 'start'))


def encode(text):
    """Its ids. Of an empty text, the token that begins one."""
    ids = tokenizer.encode(text)
    if not ids and tokenizer.eot is None:
        raise ValueError("the prompt is empty, and the model's tokenizer has no eot, the token that begins a text: "
                         "write some, as with --start=TEXT")
    return ids or [tokenizer.eot]


def generate_text(prompt, stops):
    """The text after the prompt's ids, piece by piece as it is generated. Ends before the first of stops, and at
    <|endoftext|> unless special tokens are shown.
    """
    ids = torch.tensor([prompt], device=machine.device)
    options = dict(repetition_penalty=repetition_penalty, repetition_window=repetition_window,
                   no_repeat_ngram=no_repeat_ngram, vocab_size=tokenizer.vocab_size)
    eot = None if special else tokenizer.eot
    if beams > 1:
        tokens = beam_search(model, ids, max_new_tokens, beams, length_penalty, eot=eot, **options)[0, len(prompt):]
    else:
        tokens = model.stream(ids, max_new_tokens, temperature, top_k, top_p, min_p=min_p, generator=generator,
                              static=static, **options)
    decoder = codecs.getincrementaldecoder('utf-8')('replace') # a character may be several tokens
    held = '' # text that may be the beginning of a stop string
    for token in tokens:
        token = finite(token).item()
        if token == eot:
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
    print(text, end='', flush=True)


def chat():
    """The history is text; as much of its end is read as leaves room for an answer."""
    with suppress(ImportError):
        import readline # noqa: F401  lines can be edited, and earlier ones come back
    ways = "/reset forgets what was said, Ctrl-C stops an answer, Ctrl-D or /quit ends the chat"
    if sys.stdin.isatty():
        print(f"({ways})")
    history, room = '', model.config.block_size - min(max_new_tokens, model.config.block_size // 2)
    sys.stdin.reconfigure(errors='surrogateescape', newline=None) # a line that is no text is refused below
    stops = [s for s in (*map(with_line_ends, stop), user_prefix.strip()) if s]
    while True:
        try:
            line = input(user_prefix.lstrip('\n') if sys.stdin.isatty() else '')
        except EOFError:
            print()
            return
        if line.strip() == '/quit':
            return
        if line.strip() in ('/help', '/reset'):
            history = '' if line.strip() == '/reset' else history
            print('(forgotten)' if line.strip() == '/reset' else f'({ways})')
            continue
        try:
            line = read_argument(line, 'the line')
            prompt = encode(history + user_prefix + line + bot_prefix)[-room:]
        except ValueError as e: # characters that the vocabulary lacks, or no UTF-8: only this line is lost
            print('error:', e, file=sys.stderr)
            continue
        show(bot_prefix.lstrip('\n'))
        answer = ''
        try:
            for text in generate_text(prompt, stops):
                text = text if answer else text.lstrip()
                answer += text
                show(text)
        except KeyboardInterrupt: # the next one, at the prompt, leaves
            show(' (stopped)')
        show('\n')
        history += user_prefix + line + bot_prefix + answer.rstrip()


def draw():
    """num_samples pictures in out_dir/samples.png."""
    import data.pictures # here: nobody else needs it
    prompt = [tokenizer.eot]
    if start.strip().isdecimal():
        picture = data.pictures.held_out(dataset_folder(dataset), tokenizer, int(start))
        prompt = picture[:1 + tokenizer.height // 2 * tokenizer.width].tolist()
    idx = torch.tensor([prompt] * num_samples, device=machine.device)
    ids = model.generate(idx, 1 + tokenizer.height * tokenizer.width - len(prompt), temperature, top_k, top_p=top_p,
                         min_p=min_p, generator=generator, vocab_size=tokenizer.eot)[:, 1:] # eot would begin another
    path = find_path(out_dir) / 'samples.png'
    data.pictures.save_grid(tokenizer.pictures_of(ids.cpu().numpy()), path, math.ceil(math.sqrt(num_samples)))
    print(f"picture  {path}")


def export_model():
    """Writes the folder that --export names, and says how it is opened."""
    import data.export # here: it takes a library that nobody else needs
    folder = os.path.expanduser(export)
    with_code, deviation = data.export.export(model, tokenizer, folder)
    code = ', trust_remote_code=True' if with_code else ''
    checked = "logits not checked: pip install transformers"
    if deviation is not None:
        checked = f"transformers' logits differ by at most {deviation:.1e}"
    print(f"written  {folder}: {'with its code' if with_code else 'as GPT-2'}; {checked}")
    print(f"open it  transformers.AutoModelForCausalLM.from_pretrained({folder!r}{code})")
    if tokenizer.eot is None:
        print("note     the tokenizer has no eot, the token that begins a document, which lm_eval wants")
    else:
        args = shlex.quote(f"pretrained={folder}{code.replace(' ', '')}")
        print(f"evaluate lm_eval --model hf --model_args {args} --tasks hellaswag")


def main():
    """Prints, draws, chats or exports."""
    if export:
        return export_model()
    if tokenizer.name == 'pictures':
        return draw()
    if interactive:
        return chat()
    text_before = read_prompt()
    prompt = encode(text_before)
    for _ in range(num_samples if beams == 1 else 1):
        show(text_before)
        for text in generate_text(prompt, [with_line_ends(s) for s in stop if s]):
            show(text)
        show('\n---------------\n')


with torch.inference_mode(): # a few percent faster than no_grad where a token takes a millisecond
    machine = Machine(device, dtype if dtype != 'int8' else 'auto') # of the activations
    if dtype == 'int8' and (export or compile or machine.kind != 'cpu'): # Inductor calls the kernel where it crashes
        what = f"export={export!r}" if export else 'compile=True' if compile else f"device={machine.device!r}"
        raise ValueError(f"dtype='int8' is for generation on a CPU, not for {what}: use --dtype=auto")
    settings.update(user_prefix=with_line_ends(user_prefix), bot_prefix=with_line_ends(bot_prefix))
    model, tokenizer = load()
    check_generation(model, torch.zeros(1, 1), repetition_penalty, repetition_window, no_repeat_ngram)
    small = machine.kind == 'cpu' and model.get_num_params() < 5e7 # only large weights are worth halving
    if dtype == 'auto' and (small or export): # exported as they were trained
        machine = Machine(device, 'float32')
    if dtype == 'int8':
        to_int8(model) # from the weights as they were trained
    model.to(machine.device, machine.torch_dtype)
    if compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    elif machine.kind == 'cpu' and not export:
        pack(model)
    static = Decoder.choose(model, torch.zeros(1, 1, device=machine.device), None) # one CUDA graph for all texts
    gc.enable()
    generator = torch.Generator(machine.device).manual_seed(seed % 2 ** 64) # all that it takes
    signal.signal(*END_WITH_READER)
    main()
