# What is particular to your cluster, in one place: cp launch/site.example.sh launch/site.sh, and edit that.
#
# It is read twice: by you, before sbatch (source launch/site.sh), and by every job, on its first node.
# Git ignores it.

# Where jobs go. sbatch reads these; any of its options has one (man sbatch, "INPUT ENVIRONMENT VARIABLES").
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_GPUS_PER_NODE=4
# export SBATCH_CPUS_PER_GPU=8

# The environment: one line. Without one it is that of the shell which called sbatch, else .venv in the checkout.
# module load python/3.11 cuda && source "$HOME/envs/distvgg/bin/activate"

# Or a container, in two lines: the first once, on a machine that may build; the second here. Home and the folder
# you call sbatch in are seen inside; other places of data, cache and run folders need a --bind each.
# apptainer build "$HOME/distvgg.sif" launch/apptainer.def
# export DISTVGG_CONTAINER="apptainer exec --nv --bind /scratch $HOME/distvgg.sif"

# Nodes without a network: distvgg doctor RECIPE --prepare on the login node, then these for the jobs.
# export DISTVGG_CACHE="$HOME/distvgg-cache"   # on a file system that all nodes share
# export WANDB_MODE=offline                    # afterwards, on the login node: WANDB_MODE=online distvgg sync RUN_DIR
