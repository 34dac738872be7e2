#!/bin/bash
# Submit with: sbatch configs/trainer/slurm.sh
# --nodes, --gpus-per-node and --ntasks-per-node equal num_nodes and devices of slurm.yaml.
#SBATCH --job-name=domainssl
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@180
# Clusters that preempt must send the same signal: PreemptParameters=send_user_signal.

srun python -m domainssl fit \
  --config recipes/ssl4eo_croma.yaml \
  --config configs/model/croma_base.yaml \
  --config configs/trainer/slurm.yaml \
  --data.root="${SSL4EO_ROOT:?set SSL4EO_ROOT to the folder of the data set}"
