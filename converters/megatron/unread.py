"""Megatron's training arguments that no weight, shape or logit depends on, each with the reason. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Final

REASONS: Final[Mapping[str, str]] = {
    "says where a run stood or how long it goes": """
        iteration _is_global_batch_size_explicitly_specified batch_size
        consumed_* skipped_train_samples train_* *_iters eval_* exit_* iterations_to_skip skip_train
        full_validation multiple_validation_sets start_eval_at_iter num_floating_point_operations_so_far
        phase_transition_iterations *_batch_size rampup_batch_size step_batch_size_schedule curr_iteration
        decrease_batch_size_if_needed do_train do_valid do_test finetune perform_rl_step rerun_* iter_per_epoch
    """,
    "belongs to the optimizer and its schedule": """
        optimizer optimizer_* adam_* adaptive_muon_* muon_* lion_* soap_* sgd_momentum lr lr_* min_lr warmup wsd_*
        override_opt_param_scheduler override_lr_scheduler decoupled_* weight_decay* start_weight_decay end_weight_decay
        use_checkpoint_opt_param_scheduler use_checkpoint_lr_scheduler clip_grad head_lr_mult apply_wd_to_qk_layernorm
        *_weight_decay_cond_type loss_scale* initial_loss_scale min_loss_scale hysteresis grad_norm_skip_threshold
        use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
        store_param_remainders use_distributed_optimizer use_layer_wise_* use_torch_optimizer_for_cpu_offload
        overlap_cpu_optimizer_d2h_h2d pin_cpu_* num_distributed_optimizer_instances freeze_all_layers qk_clip*
        dump_param_to_param_group_map wd_incr_steps layer_wise_*
    """,
    "says where the first weights of a run came from": """
        init_method_xavier_uniform perform_initialization use_cpu_initialization init_model_with_meta_device
        embedding_init_method_std pretrained_checkpoint moe_use_upcycling moe_upcycling_granularity
    """,
    "belongs to the loss": """
        calculate_per_token_loss cross_entropy_* mtp_loss_scaling_factor mtp_* moe_input_jitter_eps
        moe_token_drop_policy moe_pad_expert_input_to_capacity eod_mask_loss reset_* logits_load_* logits_save_*
        fp16_lm_cross_entropy moe_router_quantile_balancing_ema experimental_attention_variant_loss_scale_func
    """,
    "belongs to data and tokenizer": """
        data_* *_data_path data_parallel_random_init dataloader_* split blend* mock_data mmap_* mmap_warmup num_workers
        seq_length encoder_seq_length decoder_seq_length encoder_num_layers num_dataset_builder_threads
        per_split_data_args_path per_dataset_sequences_path mid_level_dataset_surplus object_storage_cache_path
        create_attention_mask_in_dataloader defer_npy_index_mmap fast_cache_load renormalize_blend_weights
        allow_ambiguous_pad_tokens sample_rate short_seq_prob mask_* sft sft_* fim_* tokenizer_* vocab_file merge_file
        vocab_extra_ids pad_vocab_size tiktoken_* legacy_tokenizer null_tokenizer_* trust_remote_code chat_template
        special_tokens save_tokenizer_assets use_gigatoken s3_cache_path path_to_cache dataset_* sequence_length
        variable_seq_lengths num_samples legacy_* classes_fraction no_data_sharding data_sharding metadata_path
    """,
    "says where and how checkpoints are written": """
        save save_* load load_* ckpt_* dist_ckpt_* use_dist_ckpt* async_* auto_detect_ckpt_format no_save_* no_load_*
        use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args
        use_persistent_ckpt_worker exit_on_missing_checkpoint non_persistent_* most_recent_k strict_fsdp_dtensor_load
        distrib_optim_fully_reshardable_mem_efficient verify_integrity replication* override_ckpt_iteration
        hetereogenous_dist_checkpoint fully_parallel_* enable_msc disable_msc* check_weight_hash_across_dp_*
        singleton_local_shards
    """,
    "belongs to logs and measurements": """
        log_* tensorboard_* wandb_* timing_* timers profile* nvtx_ranges pytorch_profiler_* use_pytorch_profiler
        use_nsys_profiler record_* memory_snapshot_path one_logger_* enable_one_logger no_one_logger app_tag_* otel_*
        logging_level filter_warnings modules_to_filter set_level_for_all_loggers straggler_* *_straggler*
        barrier_with_L1_time error_injection_* gpu_sniff_test_interval flight_recorder_* config_logger_dir
        run_workload_inspector_server moe_per_layer_logging moe_routing_trace_* check_for_* max_tokens_to_oom
        throughput_window_size runtime_time_unit memory_keys test_mode
    """,
    "says how ranks talk and share": """
        rank local_rank world_size distributed_* data_parallel_* context_parallel_size cp_comm_type
        hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank ddp_* DDP_impl
        overlap_* align_* tp_comm_* nccl_* use_nccl_ub use_sharp sharp_enabled_group high_priority_* batch_p2p_*
        use_ring_exchange_p2p microbatch_group_size_per_vp_stage deallocate_pipeline_outputs use_tp_pp_dp_mapping
        delay_wgrad_compute defer_embedding_wgrad_compute wgrad_deferral_limit scatter_gather_tensors_in_pipeline
        use_torch_fsdp2 torch_fsdp2_* use_megatron_fsdp use_custom_fsdp fsdp_* megatron_fsdp_*
        outer_dp_sharding_strategy
        enable_full_sharding_in_hsdp enable_gloo_process_groups use_gloo_process_groups lazy_mpu_init
        accumulate_allreduce_grads_in_fp32 grad_reduce_in_* gradient_reduce_div_fusion average_in_collective
        standalone_embedding_stage use_embedding_sharing pipeline_model_parallel_comm_backend pipeline_dtype
        fake_process_group suggested_communication_unit_size create_all_gather_group train_sync_interval
        transformer_pipeline_model_parallel_size model_parallel_size use_parallel_embedding inprocess_* ft_*
        enable_ft_package calc_ft_timeouts adlr_autoresume* manual_gc* disable_symmetric_registration
        symmetric_ar_type use_contiguous_buffers_in_local_ddp reuse_grad_buf_for_mxfp8_param_ag onnx_safe
        check_weight_hash_* gtp_* expert_gtp_* *tensor_parallel_num_weight_shards
        async_tensor_model_parallel_allreduce keep_fp8_transpose_cache* tp_only_amax_red
    """,
    "says which kernels compute, and in what precision": """
        bf16 fp16 params_dtype autocast_dtype enable_autocast fp8 fp8_* fp4 fp4_* first_last_layers_bf16
        num_layers_at_*_in_bf16 use_kitchen* kitchen_* quant_recipe te_precision_config_file te_rng_tracker
        use_te_rng_tracker transformer_engine_* attention_backend flash_attention_version flash_decode use_flash_attn
        attention_softmax_in_fp32 apply_query_key_layer_scaling fp32_residual_connection deterministic_mode
        disable_bf16_reduced_precision_matmul batch_invariant_* *_fusion* no_persist_layer_norm persist_layer_norm
        memory_efficient_layer_norm fused_* use_fused_* use_flashinfer_fused_rope use_te_activation_func
        use_transformer_engine_op_fuser use_inference_optimized_layers disable_jit_fuser enable_experimental
        moe_router_dtype moe_router_padding_for_* moe_permute_fusion* moe_router_fusion moe_grouped_gemm
        moe_use_legacy_grouped_gemm moe_use_grouped_tensor use_grouped_gemm_for_* moe_*_dtype
        activation_func_fp8_input_store disable_parameter_transpose_cache transformer_impl use_mcore_models
        deprecated_use_mcore_models use_rotary_position_embeddings output_logit_dtype logit_dtype dsa_kernel_backend
        cache_mla_latents use_one_sent_docs
    """,
    "says what is recomputed, kept elsewhere or captured": """
        recompute_* distribute_saved_activations distribute_checkpointed_activations checkpoint_activations
        activations_checkpoint_* moe_layer_recompute cpu_offloading* fine_grained_* offload_* min_offloaded_tensor_size
        delta_offload_* delay_offload_* enable_cuda_graph external_cuda_graph cuda_graph_* empty_unused_memory_level
        clone_scatter_output_in_embedding mlp_chunks_for_* num_microbatches_with_partial_activation_checkpoints
        moe_paged_stash* moe_enable_routing_replay
    """,
    "says how tokens reach experts": """
        moe_token_dispatcher_type moe_enable_deepep moe_flex_* moe_deepep_* moe_hybridep_* moe_ncclep_*
        moe_shared_expert_overlap moe_expert_rank_capacity_factor moe_pad_experts_for_cuda_graph_inference
        ep_overlap_*
    """,
    "belongs to inference servers": """
        inference_* max_requests enable_chunked_prefill disable_chunked_prefill nccl_all_reduce_for_prefill
        decode_only_cuda_graphs use_cuda_graphs_for_non_decode_steps use_legacy_static_engine num_speculative_tokens
        materialize_only_last_token_logits mamba_inference_* return_log_probs refit_method
    """,
    "belongs to other kinds of models": """
        mamba_* dsa_* linear_* hybrid_* mup_* mhc_* gdp_* kv_format vision_* swin_* dino_* num_channels num_classes
        patch_dim img_h img_w bert_* biencoder_* ict_* retro_* retriever_* indexer_* query_in_block_prob
        titles_data_path evidence_data_path block_data_path embedding_path output_bert_embeddings
        result_rejected_tracker_filename relative_attention_* rl_* grpo_* langrl_* use_mamba_mem_eff_path
        disable_mamba_mem_eff_path yarn_* language_model_spec spec
    """,
    "seeds random numbers": "seed random_seed rng_* offset_sampling_seed_by_dp_rank",
    "a file of settings, whose contents are arguments": "yaml_cfg",
}


@cache
def reason(key: str) -> str | None:
    """Why this argument is not read; None when it is on no list."""
    for why, words in REASONS.items():
        if any(re.fullmatch(word.replace("*", ".*"), key) for word in words.split()):
            return why
    return None
