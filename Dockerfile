# vlm-fix serve on NVIDIA GPUs: vLLM's own image with the plugin in it.
#   docker build -t vlm-fix .
#   docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v ~/.cache/huggingface:/root/.cache/huggingface \
#     vlm-fix llava-hf/llava-1.5-7b-hf --method pai:alpha=0.3
FROM vllm/vllm-openai:v0.32.0
COPY . /opt/vlm-fix
# --no-deps: torch, transformers and pillow are those that vLLM was built for
RUN python3 -m pip install --no-cache-dir --no-deps "/opt/vlm-fix" \
 && python3 -m pip install --no-cache-dir "rich>=13.8" "accelerate>=1.10"
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vlm-fix", "serve"]
CMD ["--help"]
