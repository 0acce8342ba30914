"""
FineWeb-Edu (huggingface.co/datasets/HuggingFaceFW/fineweb-edu), its 10-billion-token sample, as GPT-2 tokens:
9,672,101 documents, about 9.95 billion tokens. Every 2000th document is held out, about 5 million tokens. Needs 20 GB
of disk, for the tokens only. Other subsets: sample-100BT, sample-350BT, a crawl such as CC-MAIN-2024-10.

The text is streamed, which takes hours. After an interruption, the same command continues where it stopped.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --max_tokens=100_000_000     the first 100 million tokens

Then: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --dataset=fineweb_edu
This runs data/hub/prepare.py with these settings; its other settings work here too.
"""
import runpy
import sys
from pathlib import Path

sys.argv[1:1] = ['--source=HuggingFaceFW/fineweb-edu', '--subset=sample-10BT', '--out=fineweb_edu']
runpy.run_path(str(Path(__file__).resolve().parents[1] / 'hub/prepare.py'), run_name='__main__')
