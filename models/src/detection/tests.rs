//! What has no parameters: boxes, anchors, matches, pooling.

use std::time::Instant;

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tch::{Device, Kind, Tensor};

use super::{
    anchors::{Anchors, Cells, Grid},
    boxes::{BoxCoder, ImageSize, Suppression, boxes_tensor, clip_to_image, floats, iou_matrix},
    golden::{Golden, boxes_of, field},
    matching::{Assigner, Match, Sampler, Truth},
    roi_align::{Alignment, Level, RoiAlign, Sampling, SparseRows},
};
use crate::golden::{error, unit};

const POOL: RoiAlign = RoiAlign { side: 7, sampling: Sampling::Adaptive, alignment: Alignment::Centre, finest_scale: 56.0 };
const FIXED: RoiAlign = RoiAlign { side: 5, sampling: Sampling::Fixed(2), alignment: Alignment::Corner, finest_scale: 56.0 };

/// The boxes of the two images of `roi_align.json`.
fn rois(golden: &Golden) -> Vec<Tensor> {
    let of_image = |boxes: &serde_json::Value| {
        let flat: Vec<f32> =
            boxes.as_array().unwrap().iter().flat_map(|b| b.as_array().unwrap()).map(|v| v.as_f64().unwrap() as f32).collect();
        Tensor::from_slice(&flat).reshape([-1, 4])
    };
    golden.0["boxes"].as_array().unwrap().iter().map(of_image).collect()
}

#[test]
fn boxes_are_pooled_as_torchvision_does_and_so_are_gradients() {
    let golden = Golden::read("roi_align");
    for (case, pool) in [("adaptive", POOL), ("fixed", FIXED)] {
        let features = field("features", &[2, 2, 20, 28]).set_requires_grad(true);
        let pooled = pool.forward(&[Level { features: &features, stride: 4 }], &rois(&golden)).unwrap();
        (&pooled * field(&format!("upstream.{case}"), &pooled.size())).sum(Kind::Float).backward();

        let expected = golden.part(case);
        let errors = [
            error(&pooled, &expected.tensor("pooled", &[11, 2, pool.side, pool.side])),
            error(&features.grad(), &expected.tensor("gradient", &[2, 2, 20, 28])),
        ];
        println!("{case}: {errors:?}");
        assert!(errors.iter().all(|&error| error < 1e-5), "{errors:?}");
    }
}

#[test]
fn a_box_is_pooled_from_the_level_of_its_size_and_of_its_image() {
    let levels: Vec<Tensor> = (0..4).map(|level| field(&format!("level {level}"), &[2, 3, 64 >> level, 64 >> level])).collect();
    let levels: Vec<Level<'_>> = levels.iter().enumerate().map(|(place, features)| Level { features, stride: 4 << place }).collect();
    let boxes = [[[5.0, 5.0, 25.0, 45.0], [20.0, 10.0, 220.0, 230.0]], [[8.0, 9.0, 130.0, 140.0], [0.0, 0.0, 256.0, 256.0]]];
    let all = POOL.forward(&levels, &boxes.map(|boxes| boxes_tensor(&boxes))).unwrap();

    for (row, (image, corners, level)) in
        [(0, boxes[0][0], 0), (0, boxes[0][1], 1), (1, boxes[1][0], 1), (1, boxes[1][1], 2)].into_iter().enumerate()
    {
        let features = levels[level].features.narrow(0, image, 1);
        let alone = POOL.forward(&[Level { features: &features, stride: 4 << level }], &[boxes_tensor(&[corners])]).unwrap();
        assert!(error(&alone.get(0), &all.get(row as i64)) < 1e-6, "row {row}");
    }
}

#[test]
fn both_kernels_multiply_and_differentiate_alike() {
    // Rows of 2, 0, 3 and 1 values.
    let matrix = SparseRows { row_ends: vec![2, 2, 5, 6], columns: vec![0, 3, 1, 2, 3, 0], values: vec![0.5, -1.0, 2.0, 0.25, 1.0, 3.0] };
    let product = |kernel: fn(&SparseRows, &Tensor) -> Tensor| {
        let dense = field("dense", &[5, 8]).set_requires_grad(true);
        let product = kernel(&matrix, &dense);
        (&product * field("upstream", &[4, 8])).sum(Kind::Float).backward();
        (product, dense.grad())
    };
    let (by_csr, by_bags) = (product(SparseRows::times_by_csr), product(SparseRows::times_by_bags));
    assert!(by_csr.0.abs().max().double_value(&[]) > 0.1 && by_csr.1.abs().max().double_value(&[]) > 0.1);
    assert!(error(&by_bags.0, &by_csr.0) < 1e-6 && error(&by_bags.1, &by_csr.1) < 1e-6);
    let nothing = SparseRows { row_ends: vec![0, 0], columns: vec![], values: vec![] };
    for kernel in [SparseRows::times_by_csr, SparseRows::times_by_bags] {
        assert_eq!(floats(&kernel(&nothing, &field("dense", &[5, 8]))), [0.0; 16]);
    }
}

#[test]
fn levels_begin_at_56_px_and_double() {
    let level = |side: f32| POOL.level_of([10.0, 10.0, 10.0 + side, 10.0 + side], 4);
    let sides = [0.0, 1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0];
    assert_eq!(sides.map(level), [0, 0, 0, 1, 1, 2, 2, 3, 3]);
}

#[test]
fn no_boxes_pool_to_no_rows() {
    let features = field("features", &[2, 2, 20, 28]).set_requires_grad(true);
    let none = || Tensor::zeros([0, 4], (Kind::Float, Device::Cpu));
    let pooled = POOL.forward(&[Level { features: &features, stride: 4 }], &[none(), none()]).unwrap();
    assert_eq!(pooled.size(), [0, 2, 7, 7]);
    let outside = boxes_tensor(&[[-90.0, -90.0, -50.0, -50.0]]);
    let pooled = POOL.forward(&[Level { features: &features, stride: 4 }], &[none(), outside]).unwrap();
    assert_eq!((pooled.size(), pooled.abs().max().double_value(&[])), (vec![1, 2, 7, 7], 0.0));
}

#[test]
fn boxes_that_cannot_be_pooled_are_refused_in_words() {
    let features = field("features", &[1, 2, 20, 28]);
    let refusal = |boxes: Tensor| POOL.forward(&[Level { features: &features, stride: 4 }], &[boxes]).unwrap_err().to_string();
    assert_eq!(refusal(field("flat", &[8])), "boxes to pool: expected floating [N, 4], found Float [8]");
    let wild = "boxes to pool: expected corners between -1000000 and 1000000 px, found";
    assert_eq!(refusal(boxes_tensor(&[[0.0, 0.0, f32::NAN, 1.0]])), format!("{wild} NaN"));
    assert_eq!(refusal(boxes_tensor(&[[0.0, 0.0, 1e9, 1.0]])), format!("{wild} 1000000000"));
    let other_batch = POOL.forward(&[Level { features: &features, stride: 4 }], &[]).unwrap_err().to_string();
    assert_eq!(other_batch, "levels to pool from: expected floating [0, 2, h, w] and a positive stride, found Float [1, 2, 20, 28]");
}

#[test]
fn the_same_boxes_are_kept_as_by_torchvision() {
    let boxes = boxes_tensor(&boxes_of("nms.boxes", 5000, 200.0, 10.0, 80.0));
    let groups: Vec<i64> = unit("nms.groups", 5000).map(|u| ((u + 1.0) * 10.0) as i64).collect();
    let kept = Golden::read("boxes").integers("kept");
    let keep =
        |keep| Suppression { iou: 0.5, keep }.of_groups(&boxes, &field("nms.scores", &[5000]), &Tensor::from_slice(&groups)).unwrap();
    assert_eq!(keep(usize::MAX), kept);
    assert_eq!(keep(300), kept[..300]);
    // The numbers of groups do not matter, nor their sign.
    let moved: Vec<i64> = groups.iter().map(|group| if *group == 3 { i64::MAX } else { group - 7 }).collect();
    let moved = Suppression { iou: 0.5, keep: 300 }.of_groups(&boxes, &field("nms.scores", &[5000]), &Tensor::from_slice(&moved)).unwrap();
    assert_eq!(moved, kept[..300]);
}

#[test]
fn classes_of_boxes_are_kept_as_if_they_were_written_out() {
    let (n, k) = (60, 7);
    let boxes = boxes_of("classes.boxes", n, 50.0, 10.0, 60.0);
    let scores = field("classes.scores", &[n as i64, k as i64]);
    let rule = Suppression { iou: 0.4, keep: 40 };
    let kept = rule.of_classes(&boxes_tensor(&boxes), &scores, 0.1).unwrap();

    let above: Vec<usize> = floats(&scores).iter().enumerate().filter(|&(_, &score)| score > 0.1).map(|(place, _)| place).collect();
    let written_out = boxes_tensor(&above.iter().map(|place| boxes[place / k]).collect::<Vec<_>>());
    let of = |numbers: Vec<i64>| Tensor::from_slice(&numbers);
    let chosen = scores.flatten(0, 1).index_select(0, &of(above.iter().map(|&place| place as i64).collect()));
    let groups = of(above.iter().map(|place| (place % k) as i64).collect());
    let expected = rule.of_groups(&written_out, &chosen, &groups).unwrap();
    let found: Vec<i64> = kept.rows.iter().zip(&kept.classes).map(|(row, class)| row * k as i64 + class).collect();
    assert_eq!(found, expected.iter().map(|&place| above[place as usize] as i64).collect::<Vec<_>>());
    // Each class with boxes of its own, which here are the same ones.
    let own = rule.of_classes(&boxes_tensor(&boxes).repeat([1, k as i64]), &scores, 0.1).unwrap();
    assert_eq!((own.rows, own.classes), (kept.rows, kept.classes));
}

#[test]
fn a_thousand_boxes_of_1203_classes_take_less_than_two_seconds() {
    let boxes = boxes_tensor(&boxes_of("many.boxes", 1000, 700.0, 10.0, 300.0));
    let scores = field("many.scores", &[1000, 1203]);
    let start = Instant::now();
    let kept = Suppression { iou: 0.5, keep: 300 }.of_classes(&boxes, &scores, -2.0).unwrap();
    let limited = start.elapsed();
    println!("300 of 1.2 million: {limited:.1?}");
    assert_eq!(kept.rows.len(), 300);
    assert!(limited.as_secs_f64() < 2.0, "{limited:?}");
}

#[test]
fn overlaps_deltas_and_boxes_equal_torchvisions() {
    let golden = Golden::read("boxes");
    let boxes = |name, n| boxes_tensor(&boxes_of(name, n, 60.0, 10.0, 80.0));
    let iou = iou_matrix(&boxes("overlaps.a", 7), &boxes("overlaps.b", 5)).unwrap();
    assert!(error(&iou, &golden.tensor("iou", &[7, 5])) < 1e-6);

    let coder = BoxCoder { stds: [0.1, 0.1, 0.2, 0.2] };
    let (from, to) = (boxes("coder.from", 6), boxes("coder.to", 6));
    let encoded = coder.encode(&from, &to).unwrap();
    assert!(error(&encoded, &golden.tensor("encoded", &[6, 4])) < 1e-4);
    assert!(error(&coder.decode(&from, &encoded).unwrap(), &to) < 1e-4);
    let deltas = field("coder.deltas", &[6, 8]) * 3.0;
    drop(deltas.get(5).narrow(0, 2, 2).fill_(25.0));
    assert!(error(&coder.decode(&from, &deltas).unwrap(), &golden.tensor("decoded", &[6, 8])) < 1e-3);
}

#[test]
fn a_scale_of_ln_2_doubles_a_box_and_scales_end_at_62_5() {
    let coder = BoxCoder { stds: [0.1, 0.1, 0.2, 0.2] };
    let decode = |scale: f64| {
        let deltas = Tensor::from_slice(&[0.0, 0.0, scale, scale]).reshape([1, 4]);
        floats(&coder.decode(&boxes_tensor(&[[10.0, 20.0, 30.0, 60.0]]), &deltas).unwrap())
    };
    for (scale, expected) in
        [(2.0_f64.ln() * 5.0, [0.0, 0.0, 40.0, 80.0]), (1e3, [-605.0, -1210.0, 645.0, 1290.0]), (-1e3, [19.84, 39.68, 20.16, 40.32])]
    {
        let found = decode(scale);
        assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-3), "{scale}: {found:?}");
    }
}

#[test]
fn clipped_boxes_lie_in_their_image() {
    let clipped =
        clip_to_image(&boxes_tensor(&[[-5.0, 3.0, 200.0, 90.0], [110.0, -9.0, 130.0, -1.0]]), ImageSize { width: 100, height: 50 });
    assert_eq!(floats(&clipped), [0.0, 3.0, 100.0, 50.0, 100.0, 0.0, 100.0, 0.0]);
}

fn anchors(grid: Grid) -> Anchors {
    Anchors { scale: 8.0, ratios: vec![0.5, 1.0, 2.0], grid }
}

#[test]
fn anchors_have_the_side_of_eight_strides_and_lie_on_cells() {
    let found = anchors(Grid::Exact).of_level(Cells { height: 2, width: 3, stride: 4 }, [8, 12]);
    assert_eq!(found.len(), 18);
    // Of a cell the ratios 0.5, 1 and 2; columns come before rows.
    let (long, short) = (22.627_417, 11.313_708);
    for (place, expected) in [
        (0, [-long, -short, long, short]),
        (1, [-16.0, -16.0, 16.0, 16.0]),
        (2, [-short, -long, short, long]),
        (4, [-12.0, -16.0, 20.0, 16.0]),
        (10, [-16.0, -12.0, 16.0, 20.0]),
    ] {
        assert_eq!(boxes_tensor(&[found[place]]), boxes_tensor(&[expected]));
    }
}

#[test]
fn rounded_anchors_equal_torchvisions() {
    // The last level's stride is 48 / 3 along x, 40 / 3 along y.
    let levels = [Cells { height: 5, width: 6, stride: 4 }, Cells { height: 3, width: 3, stride: 8 }];
    let found: Vec<f32> = levels.iter().flat_map(|&cells| anchors(Grid::Rounded).of_level(cells, [40, 48])).flatten().collect();
    assert_eq!(found, Golden::read("boxes").floats("anchors"));
}

/// As torchvision writes them.
fn numbered(matches: &[Match]) -> Vec<i64> {
    let number = |found: &Match| match *found {
        Match::Object(object) => object as i64,
        Match::Background => -1,
        Match::Ignored => -2,
    };
    matches.iter().map(number).collect()
}

#[test]
fn boxes_stand_for_the_same_objects_as_torchvisions() {
    let golden = Golden::read("matching");
    let (boxes, objects) = (boxes_of("matching.boxes", 2000, 200.0, 10.0, 80.0), boxes_of("matching.objects", 12, 200.0, 10.0, 80.0));
    let at_half = Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None };
    assert_eq!(numbered(&at_half.assign(&boxes, &objects)), golden.integers("at_half"));
    let low_quality = Assigner { object_iou: 0.7, background_iou: 0.3, best_of_object_iou: Some(0.3) };
    assert_eq!(numbered(&low_quality.assign(&boxes, &objects)), golden.integers("low_quality"));
}

#[test]
fn without_objects_every_box_is_background() {
    let rule = Assigner { object_iou: 0.7, background_iou: 0.3, best_of_object_iou: Some(0.0) };
    assert_eq!(rule.assign(&[[0.0, 0.0, 9.0, 9.0]; 3], &[]), [Match::Background; 3]);
}

#[test]
fn what_lies_in_a_crowd_is_no_background_but_objects_there_are_objects() {
    let truth = Truth { objects: boxes_tensor(&[[0.0, 0.0, 8.0, 8.0]]), crowds: boxes_tensor(&[[0.0, 0.0, 40.0, 10.0]]) };
    let boxes = [
        // Half in the crowd; a little less; the object in the crowd; the crowd in the box.
        [0.0, 0.0, 20.0, 20.0],
        [0.0, 0.0, 20.0, 20.1],
        [0.0, 0.0, 8.0, 8.0],
        [0.0, 0.0, 100.0, 100.0],
        [7.0, 7.0, 7.0, 9.0],
    ];
    let rule = Assigner { object_iou: 0.5, background_iou: 0.5, best_of_object_iou: None };
    let mut matches = rule.assign(&boxes, &[[0.0, 0.0, 8.0, 8.0]]);
    truth.ignore_crowded(&boxes, &mut matches).unwrap();
    assert_eq!(matches, [Match::Ignored, Match::Background, Match::Object(0), Match::Background, Match::Background]);
}

#[test]
fn an_object_that_nothing_overlaps_claims_no_box() {
    let rule = Assigner { object_iou: 0.7, background_iou: 0.3, best_of_object_iou: Some(0.0) };
    assert_eq!(rule.assign(&[[0.0, 0.0, 9.0, 9.0]], &[[20.0, 20.0, 30.0, 30.0]]), [Match::Background]);
}

#[test]
fn samples_keep_their_shares_and_depend_on_the_generator_alone() {
    let matches: Vec<Match> = (0..1000)
        .map(|place| match place % 10 {
            0..3 => Match::Object(place),
            3 => Match::Ignored,
            _ => Match::Background,
        })
        .collect();
    let sampler = Sampler { n: 256, object_fraction: 0.5, background_per_object: None };
    let draw = |seed| sampler.draw(&matches, &mut ChaCha8Rng::seed_from_u64(seed));
    let sample = draw(1);
    assert_eq!((sample.objects.len(), sample.background.len()), (128, 128));
    assert!(sample.objects.iter().all(|&place| place % 10 < 3) && sample.background.iter().all(|&place| place % 10 > 3));
    assert!(sample.objects.is_sorted_by(|a, b| a < b) && sample.background.is_sorted_by(|a, b| a < b));
    assert_eq!(sample, draw(1));
    assert_ne!(sample, draw(2));
    // Few objects: background fills up.
    let few = sampler.draw(&matches[..100], &mut ChaCha8Rng::seed_from_u64(1));
    assert_eq!((few.objects.len(), few.background.len()), (30, 60));
}

#[test]
fn every_box_is_as_likely_to_be_drawn() {
    let sampler = Sampler { n: 5, object_fraction: 0.0, background_per_object: None };
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut counts = [0; 20];
    for _ in 0..4000 {
        sampler.draw(&[Match::Background; 20], &mut rng).background.iter().for_each(|&place| counts[place] += 1);
    }
    // 1,000 expected each, standard deviation 27.
    assert!(counts.iter().all(|count| (880..1120).contains(count)), "{counts:?}");
}

/// LP-OVOD's sampler for probing: columns are candidates that match, of these sampled, and sampled background, of 1,000.
#[test]
fn background_is_limited_by_the_matched_boxes() {
    let sampler = Sampler { n: 512, object_fraction: 0.25, background_per_object: Some(10) };
    let golden = crate::golden::lp_ovod();
    let table = Vec::<i64>::try_from(golden["sampler/positives_negatives_ub10"].flatten(0, 1)).unwrap();
    for row in table.chunks_exact(3) {
        let n_matched = row[0] as usize;
        let matches = [vec![Match::Object(0); n_matched], vec![Match::Background; 1000]].concat();
        let sample = sampler.draw(&matches, &mut ChaCha8Rng::seed_from_u64(3));
        assert_eq!([sample.objects.len() as i64, sample.background.len() as i64], row[1..], "{n_matched}");
    }
    assert_eq!(table.len(), 24);
}
