# recap serve on a CPU:
#   docker build -t recap .
#   docker run --rm -p 127.0.0.1:8000:8000 -e RECAP_TOKEN=s3cret recap
FROM python:3.12-slim
# PyPI's torch for Linux brings CUDA, which is several gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN pip install --index-url "$TORCH_INDEX" torch==2.13.0
WORKDIR /src
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY recap_cli recap_cli
COPY recap_hf recap_hf
COPY modeling modeling
COPY conversion conversion
COPY model_cards model_cards
RUN pip install ".[serve]"
RUN useradd --create-home recap
USER recap
WORKDIR /home/recap
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["recap"]
CMD ["serve", "--host", "0.0.0.0"]
