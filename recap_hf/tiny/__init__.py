"""recap-tiny, the embedded default, made from nothing but a folder of sounds.

The commands that made the shipped one, on two CPU cores (`torchrun` starts two processes of one thread each; both
`--threads 1` and one process work as well):

    recap tiny tokenizers --work-dir work
    torchrun --nproc_per_node 2 -m recap_hf.cli tiny clap --sounds sound_events --work-dir work --threads 1
    torchrun --nproc_per_node 2 -m recap_hf.cli tiny language-model --sounds sound_events --work-dir work --threads 1
    torchrun --nproc_per_node 2 -m recap_hf.cli tiny captioner --sounds sound_events --work-dir work --threads 1
    recap tiny evaluate --model work/captioner/model --sounds sound_events --fold 5 --keywords keywords.json

Each stage resumes from its checkpoint. The shipped language model differs from what the third command makes: its first
400 steps ran under another schedule, its first 1,000 were one process's, annealed, before the last 800 were two
processes'.

Modules: lexicon and grammar (what is said), sounds, procedural and mixtures (what is heard), tokenization, clap,
language_model, datastore and captioner (what is trained), trainer (how), naming, evaluation_sets, evaluation and
transfer (what it is worth), examples (recordings that the package ships), card (its model card).
"""
