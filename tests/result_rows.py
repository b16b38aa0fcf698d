"""Rows of results for tests, and the headers that tables of earlier versions have."""

import csv
import io

from evaluation.results_table import RESULT_FIELDS

# What a training says of itself; two models of it differ in none of these.
TRAINING = {
    "run": "first",
    "preset": "published",
    "process": "vp cosine_clipped",
    "prediction": "epsilon",
    "loss_weights": "[1,1]",
    "perceptual_weight": "0",
    "feature_weight": "0",
    "objective": "denoising",
    "vlb_weight": "none",
    "student": "none",
    "teacher": "none",
    "student_images": "none",
    "teacher_calls": "none",
    "consistency": "none",
    "consistency_solver": "none",
    "degradation": "none",
    "severity_schedule": "none",
    "input_noise": "none",
    "min_snr_gamma": "none",
    "timestep_weights": "published",
    "t_law": "uniform",
    "times": "whole",
    "coupling": "independent",
    "start_data": "noise",
    "lr": "0.0001",
    "lr_schedule": "constant",
    "classes": "none",
    "label_dropout": "none",
    "batch_size": "64",
    "weight_decay": "0.01",
    "grad_clip": "1",
    "ema_decay": "0.9999",
    "ema_rampup_ratio": "0",
    "replan_every": "none",
    "replan_images": "none",
    "network": "unet",
    "hidden_dims": "[64,128,256,512]",
    "parameters": "58123456",
    "resolution": "64",
    "latents": "none",
    "training_images": "1280",
    "training_data": "feedbeef",
    "flip": "no",
    "training_precision": "fp32",
    "training_seed": "42",
    "images_seen": "256000",
}
# Another value of each.
OTHER_TRAINING = {
    "run": "second",
    "preset": "improved",
    "process": "vp cosine",
    "prediction": "v",
    "loss_weights": "[0.8,0.2]",
    "perceptual_weight": "0.1",
    "feature_weight": "0.05",
    "objective": "hybrid",
    "vlb_weight": "0.002",
    "student": "4calls",
    "teacher": "c0ffee",
    "student_images": "51200",
    "teacher_calls": "102400",
    "consistency": "ict over 200 epochs",
    "consistency_solver": "heun",
    "degradation": "blur:8",
    "severity_schedule": "linear",
    "input_noise": "0",
    "min_snr_gamma": "5",
    "timestep_weights": "sigma2",
    "t_law": "logit_normal:0,1",
    "times": "real",
    "coupling": "ot",
    "start_data": "cats (c0ffee)",
    "lr": "0.001",
    "lr_schedule": "cosine over 200 epochs",
    "classes": "[cat,dog]",
    "label_dropout": "0.1",
    "batch_size": "32",
    "weight_decay": "0.1",
    "grad_clip": "0.5",
    "ema_decay": "0.999",
    "ema_rampup_ratio": "0.05",
    "replan_every": "10",
    "replan_images": "16",
    "network": "ddpm_unet",
    "hidden_dims": "[32,64]",
    "parameters": "3586947",
    "resolution": "32",
    "latents": "sd-vae (c0ffee)",
    "training_images": "640",
    "training_data": "cafe",
    "flip": "yes",
    "training_precision": "bf16",
    "training_seed": "43",
    "images_seen": "128000",
}

VALUES = (
    "fid,fid_infinity,kid,kid_sd,inception_score,inception_score_sd,manifold_precision,manifold_recall,"
    "swd,swd_64,swd_32,swd_16,nn_distance,nn_distance_real,authenticity"
)
_KEY = "checkpoint_fingerprint,weights,path_fingerprint,nfe,seed,num_images"
_OLDEST = "dataset,model_type,epoch,path_type,metric,fid,swd,swd_64,swd_32,swd_16,seconds,checkpoint,date"
_LATER_KEY = f"{_KEY},metric,metric_features,resize,reference_fingerprint,precision"
_LATER = "dataset,reference,reference_images,model_type,epoch,path_type"
_TRAINING = (
    "run,preset,process,prediction,loss_weights,min_snr_gamma,lr,lr_schedule,batch_size,weight_decay,grad_clip,ema_decay,"
    "ema_rampup_ratio,replan_every,replan_images,hidden_dims,parameters,resolution,training_images,training_data,flip,"
    "training_precision,training_seed,images_seen"
)
_LATER_TRAINING = _TRAINING.replace("min_snr_gamma,", "min_snr_gamma,timestep_weights,t_law,times,")
_NEXT_TRAINING = (
    _LATER_TRAINING.replace("min_snr_gamma,", "perceptual_weight,feature_weight,objective,vlb_weight,min_snr_gamma,")
    .replace("batch_size,", "classes,label_dropout,batch_size,")
    .replace("hidden_dims,", "network,hidden_dims,")
    .replace("resolution,", "resolution,latents,")
)
_STUDENTS_TRAINING = _NEXT_TRAINING.replace(
    "vlb_weight,", "vlb_weight,student,teacher,student_images,teacher_calls,consistency,consistency_solver,"
).replace("times,", "times,coupling,start_data,")
_NEXT_VALUES = f"{VALUES},fd,fd_real,class_score,class_score_sd,class_score_real,class_accuracy,class_accuracy_real"
# By the number of their columns.
EARLIER_HEADERS = {
    header.count(",") + 1: header
    for header in (
        f"{_KEY},metric_features,reference_fingerprint,{_OLDEST}",
        f"{_KEY},metric_features,reference_fingerprint,precision,{_OLDEST}",
        f"{_LATER_KEY},{_LATER},{VALUES},seconds,checkpoint,date",
        f"{_LATER_KEY},{_LATER},coarse_from,regime,{VALUES},seconds,checkpoint,date",
        f"{_LATER_KEY},{_LATER},coarse_from,regime,representation,{VALUES},seconds,checkpoint,date",
        f"{_LATER_KEY},{_LATER},coarse_from,regime,representation,solver,{_TRAINING},{VALUES},seconds,checkpoint,date",
        f"{_LATER_KEY},{_LATER},coarse_from,regime,representation,solver,{_LATER_TRAINING},{VALUES},seconds,checkpoint,"
        "date",
        *(
            f"{_LATER_KEY},dataset,reference,reference_images,floor_images,model_type,epoch,path_type,coarse_from,"
            f"regime,representation,solver,guidance,{training},{_NEXT_VALUES},seconds,checkpoint,date"
            for training in (_NEXT_TRAINING, _STUDENTS_TRAINING)
        ),
    )
}


def make_row(**changes):
    """A row as `append_row` takes it."""
    return {
        "checkpoint_fingerprint": "c0ffee",
        "weights": "raw",
        "path_fingerprint": "abc",
        "nfe": 18,
        "seed": 42,
        "num_images": 1000,
        "metric": "fid",
        "metric_features": "inception-123",
        "resize": "pytorch-fid",
        "reference_fingerprint": "def",
        "precision": "fp32",
        "dataset": "cats, small",
        "reference": "train",
        "reference_images": 13747,
        "floor_images": "",
        "model_type": "dual",
        "epoch": 200,
        "path_type": "diagonal",
        "coarse_from": "",
        "regime": "independent",
        "representation": "overcomplete",
        "solver": "ddim eta 0 clean",
        "guidance": "",
        "fid": 33.25,
        "seconds": 1.5,
        "checkpoint": "lift_dual_timestep_200ep.pth",
        "date": "2025-01-31T23:59:59Z",
        **TRAINING,
        **changes,
    }


def as_read(row):
    """What `read_rows` makes of a row."""
    return {field: "" if row.get(field) is None else str(row[field]) for field in RESULT_FIELDS}


def table_text(header, rows, **style):
    """A table of some columns, as text; `style` is that of `csv.writer`."""
    stream = io.StringIO()
    writer = csv.writer(stream, **{"lineterminator": "\n"} | style)
    writer.writerow(header)
    writer.writerows([[as_read(row)[column] for column in header] for row in rows])
    return stream.getvalue()
