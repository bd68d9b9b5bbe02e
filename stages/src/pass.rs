//! One pass over images that feeds one stage or several: each image is decoded once, views of it are cut on threads ahead of the networks,
//! views of different images share batches, and rows go to the units they belong to.
//!
//! Stages that share a pass read the same images in the same order. Each has its own units, batches and shards, so that it publishes what
//! it would publish alone.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    mem,
    ops::Range,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use ovenbird_cache::Digest;
use ovenbird_data::{Error as DataError, annotations::ImageInfo, images::Image};
use serde_json::Value;

use crate::{
    Error, Result,
    artifacts::{Images, ReusedRows, Row, RowKind, RowWriter},
    clip::encoder::{Encoder, PRECISION, Pending, View},
    context::{Attempted, Context, UnitDraft},
    feed::stream,
    units::Unit,
};

/// Bytes of decoded images and views that may be ahead of the networks.
const ROOM: usize = 256 << 20;
/// Views that are cut as one job.
const VIEWS_A_JOB: usize = 32;

/// What is cut out of an image.
pub(crate) enum Cut {
    /// Views for the network.
    Views(Vec<View>),
    /// The finished row of a stage without a network.
    Row(Row),
}

/// How a stage turns images into views, and the views' embeddings into rows. `place`: of an image in the pass's list.
pub(crate) trait Views: Sync {
    /// The number of views of an image. A stage without a network has one.
    fn n_views(&self, place: usize, info: &ImageInfo) -> usize;
    /// Why an image of this size cannot be used, and a hint. Such an image is an item that failed.
    fn refusal(&self, _place: usize, _info: &ImageInfo) -> Option<(String, &'static str)> {
        None
    }
    /// The image that views are cut from, made once for all of them; the decoded one unless a stage shows it otherwise.
    fn shown(&self, _info: &ImageInfo, image: Arc<Image>) -> Arc<Image> {
        image
    }
    /// The bytes of a number of a view.
    fn number_bytes(&self) -> usize {
        1
    }
    /// Cuts some of the views. `image`: of [`Views::shown`].
    fn cut(&self, place: usize, info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut;
    /// The least length of the shorter side, in px, where images need not be decoded at their full size. Images decoded so are not shared
    /// with other stages.
    fn draft_side(&self) -> Option<u32> {
        None
    }
    /// The image's row, from the embeddings of all its views, `[V, D]`.
    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], dim: usize) -> Row;
}

/// A folder of images and their annotated sizes, in ascending id.
pub(crate) struct ImageList {
    pub(crate) images: Images,
    pub(crate) infos: Vec<ImageInfo>,
}

impl ImageList {
    /// The images of a stage's items; in a dry run the first few.
    fn infos_of(&self, cx: &Context<'_>) -> &[ImageInfo] {
        &self.infos[..self.infos.len().min(cx.items.len())]
    }

    fn decode(&self, place: usize) -> Result<Image> {
        let ImageInfo { file_name, width, height, .. } = &self.infos[place];
        self.images.decode_sized(file_name, [*width, *height])
    }

    fn decode_draft(&self, place: usize, least_side: u32) -> Result<Image> {
        let ImageInfo { file_name, width, height, .. } = &self.infos[place];
        self.images.decode_draft(file_name, [*width, *height], least_side)
    }
}

/// A stage's part in a pass.
pub struct ImageConsumer<'a> {
    pub(crate) cx: &'a Context<'a>,
    pub(crate) units: &'a [Unit],
    pub(crate) list: ImageList,
    pub(crate) views: Box<dyn Views + 'a>,
    pub(crate) encoder: Option<Encoder>,
    pub(crate) port: &'static str,
    pub(crate) rows: RowKind,
}

/// Makes the units of every consumer in one pass. All of them read the same images.
pub(crate) fn run(consumers: &[ImageConsumer<'_>]) -> Result<()> {
    let n_threads = consumers.iter().map(|consumer| consumer.cx.threads).max().unwrap_or(1);
    let list = &consumers[0].list;
    assert!(consumers.iter().all(|consumer| consumer.list.infos == list.infos), "BUG: a pass over different images");
    for consumer in consumers {
        consumer.list.images.look_for(consumer.list.infos_of(consumer.cx), consumer.cx)?;
    }
    let preparations: Vec<Preparation<'_>> = consumers.iter().map(Preparation::of).collect();
    let mut writers: Vec<UnitWriter<'_>> = consumers.iter().map(UnitWriter::of).collect();
    let cursors = preparations.iter().map(|_| Cursor::default()).collect();
    let mut source = JobSource { list, preparations: &preparations, cursors, place: 0, jobs: VecDeque::new() };
    let prepare = |job: Job| match job {
        Job::Cut { consumer, place, views, image, shown } => {
            let is_first = views.start == 0;
            Ready::Cut { consumer, place, is_first, cut: preparations[consumer].cut(list, place, views, &image, &shown) }
        }
        Job::Open { consumer, opened } => Ready::Open { consumer, opened },
        Job::Reuse { consumer, place } => Ready::Reuse { consumer, place },
        Job::Close { consumer } => Ready::Close { consumer },
    };
    let ended = stream(
        n_threads,
        ROOM,
        || source.next(),
        prepare,
        |ready, n_ready| match ready {
            Ready::Open { consumer, opened } => writers[consumer].open(*opened),
            Ready::Reuse { consumer, place } => writers[consumer].reuse(place),
            Ready::Cut { consumer, place, is_first, cut } => writers[consumer].receive(place, is_first, cut, n_ready),
            Ready::Close { consumer } => writers[consumer].close(),
        },
    );
    if matches!(ended, Err(Error::Stopped)) {
        writers.iter_mut().try_for_each(UnitWriter::keep_part)?;
    }
    ended?;
    if let Some(remarks) = list.images.remarks() {
        consumers.iter().for_each(|consumer| consumer.cx.note(&remarks));
    }
    Ok(())
}

/// An image that several jobs use, decoded by the first of them.
#[derive(Default)]
struct SharedImage {
    /// Locked while it is decoded: the other jobs wait for that.
    image: Mutex<Option<Arc<Image>>>,
}

impl SharedImage {
    fn get(&self, list: &ImageList, place: usize) -> Result<Arc<Image>> {
        let mut shared = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = &*shared {
            return Ok(Arc::clone(image));
        }
        let image = Arc::new(list.decode(place)?);
        *shared = Some(Arc::clone(&image));
        Ok(image)
    }
}

enum Job {
    Open { consumer: usize, opened: Box<Opened> },
    Reuse { consumer: usize, place: usize },
    Cut { consumer: usize, place: usize, views: Range<usize>, image: Arc<SharedImage>, shown: Arc<OnceLock<Arc<Image>>> },
    Close { consumer: usize },
}

enum Ready {
    Open { consumer: usize, opened: Box<Opened> },
    Reuse { consumer: usize, place: usize },
    Cut { consumer: usize, place: usize, is_first: bool, cut: Attempted<Cut> },
    Close { consumer: usize },
}

/// A unit that this process makes, and the rows of it that other units already hold.
struct Opened {
    draft: UnitDraft,
    reused: ReusedRows,
}

/// The part of a consumer that the preparing threads use. Its encoder stays on the thread that runs the network.
struct Preparation<'a> {
    cx: &'a Context<'a>,
    units: &'a [Unit],
    views: &'a dyn Views,
    port: &'static str,
    rows: RowKind,
    /// Bytes of a view; 0 where the view is the image itself.
    view_bytes: usize,
    /// The precision that its network computes in.
    precision: Option<&'static str>,
}

impl<'a> Preparation<'a> {
    fn of(consumer: &'a ImageConsumer<'_>) -> Self {
        let ImageConsumer { cx, units, views, encoder, port, rows, .. } = consumer;
        let view_bytes = encoder
            .as_ref()
            .map_or(0, |encoder| if encoder.batch() > 1 { views.number_bytes() * encoder.preprocess.n_numbers() } else { 0 });
        let precision = encoder.as_ref().map(|encoder| encoder.precision);
        Self { cx, units, views: &**views, port, rows: *rows, view_bytes, precision }
    }

    /// Decodes an image, unless another job did so already, and cuts some of its views. `shown`: the image as this consumer shows it, once
    /// one of its jobs has made it.
    fn cut(
        &self,
        list: &ImageList,
        place: usize,
        views: Range<usize>,
        image: &SharedImage,
        shown: &OnceLock<Arc<Image>>,
    ) -> Attempted<Cut> {
        self.cx.attempt(|| {
            // Without views the image need not be decoded.
            if views.is_empty() {
                return Ok(Cut::Views(Vec::new()));
            }
            let image = match self.views.draft_side() {
                None => image.get(list, place)?,
                Some(least_side) => Arc::new(list.decode_draft(place, least_side)?),
            };
            // A damaged file is reported first.
            if let Some((problem, hint)) = self.views.refusal(place, &list.infos[place]) {
                let path = list.images.file(&list.infos[place].file_name)?.path.clone();
                return Err(Error::Data(DataError::Malformed { path, problem, hint: Some(hint.into()) }));
            }
            let info = &list.infos[place];
            let shown = shown.get_or_init(|| self.views.shown(info, image));
            Ok(self.views.cut(place, info, shown, views.clone()))
        })
    }
}

/// How far a consumer's units have got.
#[derive(Default)]
struct Cursor {
    next_unit: usize,
    /// Of the open unit: places of the images whose rows are reused.
    reused: Option<HashSet<usize>>,
}

/// Gives the jobs of all consumers, image by image.
struct JobSource<'a> {
    list: &'a ImageList,
    preparations: &'a [Preparation<'a>],
    cursors: Vec<Cursor>,
    place: usize,
    jobs: VecDeque<(Job, usize)>,
}

impl JobSource<'_> {
    fn next(&mut self) -> Result<Option<(Job, usize)>> {
        while self.jobs.is_empty() && self.place < self.list.infos.len() {
            let ImageInfo { width, height, .. } = self.list.infos[self.place];
            let image = Arc::default();
            let mut image_bytes = 3 * width as usize * height as usize;
            for consumer in 0..self.preparations.len() {
                self.push_jobs(consumer, &image, &mut image_bytes)?;
            }
            self.place += 1;
        }
        Ok(self.jobs.pop_front())
    }

    /// Queues a consumer's jobs for the image at the present place.
    fn push_jobs(&mut self, consumer: usize, image: &Arc<SharedImage>, image_bytes: &mut usize) -> Result<()> {
        let (Preparation { cx, units, views, port, rows, view_bytes, precision }, cursor, place) =
            (&self.preparations[consumer], &mut self.cursors[consumer], self.place);
        let Some(unit) = units.get(cursor.next_unit) else { return Ok(()) };
        if unit.items.start == place {
            // A unit that another process makes is passed over.
            cursor.reused = None;
            if let Some(draft) = cx.begin_claimed(unit)? {
                let items = &cx.items[unit.items.clone()];
                let reusable = cx.reusable_items(&draft, precision.map(|precision| (PRECISION, precision)))?;
                let reused = ReusedRows::new(*rows, &reusable, items, &self.list.infos[unit.items.clone()], port);
                cursor.reused = Some(unit.items.clone().filter(|place| reused.has(&cx.items[*place])).collect());
                self.jobs.push_back((Job::Open { consumer, opened: Box::new(Opened { draft, reused }) }, 0));
            }
        }
        if let Some(reused) = cursor.reused.as_ref().filter(|_| unit.items.contains(&place)) {
            if reused.contains(&place) {
                self.jobs.push_back((Job::Reuse { consumer, place }, 0));
            } else {
                let n_views = views.n_views(place, &self.list.infos[place]);
                let shown = Arc::default();
                for start in (0..n_views.max(1)).step_by(VIEWS_A_JOB) {
                    let views = start..n_views.min(start + VIEWS_A_JOB);
                    // The image's bytes count with the first job that needs it.
                    let weight = views.len() * view_bytes + if views.is_empty() { 0 } else { mem::take(image_bytes) };
                    self.jobs.push_back((Job::Cut { consumer, place, views, image: Arc::clone(image), shown: Arc::clone(&shown) }, weight));
                }
            }
        }
        if unit.items.end == place + 1 {
            cursor.next_unit += 1;
            if cursor.reused.take().is_some() {
                self.jobs.push_back((Job::Close { consumer }, 0));
            }
        }
        Ok(())
    }
}

/// Runs a consumer's network on its views and writes its units.
struct UnitWriter<'a> {
    cx: &'a Context<'a>,
    list: &'a ImageList,
    how: &'a dyn Views,
    encoder: Option<&'a Encoder>,
    rows: RowKind,
    port: &'static str,
    /// Views that are not encoded yet.
    views: Vec<View>,
    /// The batch that the network got last.
    in_flight: Option<Pending>,
    /// Embeddings of the images in `waiting`, as far as they are computed.
    embeddings: Vec<f32>,
    /// Images whose rows are not written yet, in order.
    waiting: VecDeque<Waiting>,
    unit: Option<UnitState>,
}

/// The unit that is being written.
struct UnitState {
    shard: RowWriter,
    reused: ReusedRows,
    draft: UnitDraft,
    n_reused: usize,
    n_rows: usize,
    /// The image that was skipped last.
    skipped: Option<usize>,
    /// The items whose rows are in the shard.
    finished: Vec<Digest>,
}

/// An image whose row is not written yet, by its place.
enum Waiting {
    ForViews { place: usize, n_views: usize },
    Row { place: usize, row: Row },
}

impl<'a> UnitWriter<'a> {
    fn of(consumer: &'a ImageConsumer<'_>) -> Self {
        Self {
            cx: consumer.cx,
            list: &consumer.list,
            how: &*consumer.views,
            encoder: consumer.encoder.as_ref(),
            rows: consumer.rows,
            port: consumer.port,
            views: Vec::new(),
            in_flight: None,
            embeddings: Vec::new(),
            waiting: VecDeque::new(),
            unit: None,
        }
    }

    fn dim(&self) -> usize {
        self.encoder.map_or(0, Encoder::dim)
    }

    fn open(&mut self, opened: Opened) -> Result<()> {
        let Opened { draft, reused } = opened;
        let file = draft.create_at(self.port, self.rows.file_name())?;
        let shard = RowWriter::new(self.rows, file, &draft.unit().fingerprint, self.dim(), self.encoder.map(|encoder| encoder.space))?;
        self.unit = Some(UnitState { shard, reused, draft, n_reused: 0, n_rows: 0, skipped: None, finished: Vec::new() });
        Ok(())
    }

    fn unit(&mut self) -> &mut UnitState {
        self.unit.as_mut().expect("BUG: a unit is opened before its images come")
    }

    /// Copies an image's row from another unit.
    fn reuse(&mut self, place: usize) -> Result<()> {
        let (item, image) = (self.cx.items[place], self.list.infos[place].id);
        let unit = self.unit();
        let row = unit.reused.take(&item, image)?;
        unit.n_reused += 1;
        self.waiting.push_back(Waiting::Row { place, row });
        self.write_finished()
    }

    fn receive(&mut self, place: usize, is_first: bool, cut: Attempted<Cut>, n_ready: usize) -> Result<()> {
        let name = &self.list.infos[place].file_name;
        let cx = self.cx;
        let unit = self.unit();
        if unit.skipped == Some(place) {
            return Ok(());
        }
        match cx.accept_or_skip(&unit.draft, name, cut, cx.items.len())? {
            None => unit.skipped = Some(place),
            Some(Cut::Row(row)) => self.waiting.push_back(Waiting::Row { place, row }),
            Some(Cut::Views(views)) => {
                if is_first {
                    self.waiting.push_back(Waiting::ForViews { place, n_views: self.how.n_views(place, &self.list.infos[place]) });
                }
                self.views.extend(views);
            }
        }
        while let Some(encoder) = self.encoder.filter(|encoder| self.views.len() >= encoder.batch()) {
            self.embed(encoder, encoder.batch(), n_ready)?;
            cx.proceed()?;
        }
        self.write_finished()?;
        cx.proceed()
    }

    /// Runs the network on some views. While an accelerator computes a batch, the next one is put together and sent.
    fn embed(&mut self, encoder: &Encoder, n_views: usize, n_ready: usize) -> Result<()> {
        let batch = encoder.upload(&self.views[..n_views]);
        self.views.drain(..n_views);
        self.embeddings.extend(self.in_flight.take().into_iter().flat_map(Pending::rows));
        self.in_flight = Some(encoder.begin(&batch)?);
        self.cx.flow(n_views, n_ready);
        Ok(())
    }

    /// Writes the images at the front of the queue whose views are all encoded.
    fn write_finished(&mut self) -> Result<()> {
        let (dim, mut used, mut n_written) = (self.dim(), 0, 0);
        while let Some(front) = self.waiting.pop_front() {
            let (place, row) = match front {
                Waiting::Row { place, row } => (place, row),
                Waiting::ForViews { place, n_views } => {
                    let n_numbers = n_views * dim;
                    if self.embeddings.len() - used < n_numbers {
                        self.waiting.push_front(Waiting::ForViews { place, n_views });
                        break;
                    }
                    used += n_numbers;
                    let (info, embeddings) = (&self.list.infos[place], &self.embeddings[used - n_numbers..used]);
                    if let Some((encoder, problem)) = self.encoder.and_then(|encoder| Some((encoder, encoder.problem(embeddings)?))) {
                        let result: Result<Row> = Err(encoder.unsound(&format!("image `{}`: {problem}", info.file_name)));
                        let unit = self.unit.as_ref().expect("BUG: a unit is opened before its images come");
                        let attempted = Attempted { result, attempts: 1 };
                        self.cx.accept_or_skip(&unit.draft, &info.file_name, attempted, self.cx.items.len())?;
                        continue;
                    }
                    (place, self.how.row(place, info, embeddings, dim))
                }
            };
            let unit = self.unit.as_mut().expect("BUG: a unit is opened before its images come");
            unit.n_rows += row.len();
            unit.finished.push(self.cx.items[place]);
            unit.shard.push(row)?;
            n_written += 1;
        }
        self.embeddings.drain(..used);
        if n_written > 0 {
            self.cx.tick(n_written);
        }
        Ok(())
    }

    /// Keeps the finished rows of the unit that is cut off here, unless the next run can reuse as many without them.
    fn keep_part(&mut self) -> Result<()> {
        if self.unit.is_none() {
            return Ok(());
        }
        self.embeddings.extend(self.in_flight.take().into_iter().flat_map(Pending::rows));
        self.write_finished()?;
        let UnitState { shard, draft, n_reused, n_rows, finished, reused, .. } = self.unit.take().expect("BUG: a unit is open");
        if finished.len() <= reused.n_items() || self.rows == RowKind::Crops {
            return Ok(());
        }
        shard.finish()?;
        let done = format!("{} of the {} images of a unit are kept for the next run", finished.len(), draft.unit().items.len());
        self.cx.keep_part(draft, &finished, self.metrics(finished.len(), n_rows, n_reused), done)
    }

    fn metrics(&self, n_images: usize, n_rows: usize, n_reused: usize) -> BTreeMap<String, Value> {
        let counts = [("images", n_images), ("rows", n_rows), ("reused", n_reused)];
        let mut metrics: BTreeMap<String, Value> = counts.map(|(name, n)| (name.to_owned(), n.into())).into();
        if let Some(encoder) = self.encoder {
            metrics.insert(PRECISION.into(), encoder.precision.into());
        }
        metrics
    }

    fn close(&mut self) -> Result<()> {
        if let Some(encoder) = self.encoder.filter(|_| !self.views.is_empty()) {
            self.embed(encoder, self.views.len(), 0)?;
        }
        self.embeddings.extend(self.in_flight.take().into_iter().flat_map(Pending::rows));
        self.write_finished()?;
        assert!(self.waiting.is_empty() && self.embeddings.is_empty(), "BUG: a unit ends with all its views encoded");
        let UnitState { shard, draft, n_reused, n_rows, .. } = self.unit.take().expect("BUG: a unit is closed once");
        shard.finish()?;
        let metrics = self.metrics(draft.unit().items.len(), n_rows, n_reused);
        self.cx.commit(draft, metrics)
    }
}
