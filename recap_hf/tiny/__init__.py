"""recap-tiny, the embedded default, made from nothing but a folder of sounds.

`docs/recap-tiny.md` has the commands.

Modules: lexicon and grammar (what is said), sounds, procedural and mixtures (what is heard), tokenization, clap,
language_model, datastore and captioner (what is trained), trainer (how), naming, evaluation_sets, evaluation and
transfer (what it is worth), examples (recordings that the package ships), card (its model card).
"""
