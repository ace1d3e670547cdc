# bamba-quant for CPUs: docker build -t bamba-quant . && docker run --rm -v "$PWD:/work" bamba-quant --help
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu "/src[hub,torch]" \
    && rm -r /src
WORKDIR /work
ENTRYPOINT ["bamba-quant"]
