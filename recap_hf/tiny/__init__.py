"""recap-tiny, the embedded default, made from nothing but a folder of sounds.

The commands that make it, on two CPU cores in some four hours (`torchrun` starts two processes of one thread each,
which beat one process of two):

    recap tiny tokenizers --work-dir work
    torchrun --nproc_per_node 2 -m recap_hf.cli tiny clap --sounds sound_events --work-dir work --threads 1
    recap tiny language-model --sounds sound_events --work-dir work --threads 1
    recap tiny captioner --sounds sound_events --work-dir work --threads 1
    recap tiny evaluate --model work/captioner/model --sounds sound_events --fold 5 --keywords keywords.json
    recap tiny transfer --sounds sound_events --work-dir work --fold 5 --keywords keywords.json

Each stage resumes from its checkpoint. The shipped language model differs from what the third command makes in one
thing: its first 2,400 steps joined sounds in sequence by "followed by", and drew fewer texts of several sounds.

Modules: lexicon and grammar (what is said), sounds, procedural and mixtures (what is heard), tokenization, clap,
language_model, datastore and captioner (what is trained), trainer (how), naming, evaluation_sets, evaluation and
transfer (what it is worth), examples (recordings that the package ships), card (its model card).
"""
