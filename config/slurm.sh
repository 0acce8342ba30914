#!/bin/bash
# Trains from scratch on several machines. Submit it from the project's folder, on a disk shared by all machines:
#   sbatch config/slurm.sh config/train_gpt2.py
# Submit it again to resume. Tested with stand-ins for SLURM's commands, not on a cluster yet.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'torchrun --nnodes=$SLURM_NNODES --node_rank=$SLURM_NODEID --master_addr=$MASTER --master_port=29500 \
    --nproc_per_node=$SLURM_GPUS_ON_NODE train.py "$@" --init_from=auto' srun "$@"
