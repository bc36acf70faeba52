# docker build -t moe-jax .
# docker run -p 8000:8000 moe-jax --api-key SECRET          the shipped model
# docker run -p 8000:8000 -v ./runs:/app/runs moe-jax --api-key SECRET --run nano
FROM python:3.13-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY moe_jax moe_jax
COPY foundation foundation
RUN pip install --no-cache-dir ".[serve]"
WORKDIR /app
USER nobody
ENV HOME=/tmp
EXPOSE 8000
ENTRYPOINT ["moe-jax", "serve", "--host", "0.0.0.0"]
